"""The vocabulary: every noun of the loop, each one frozen type, in the order data flows through them.

    task -> rollout -> attempt -> spans -> (calls, rewards) -> episode of transitions -> batch -> update

What this file is not: behaviour. Reading spans lives in `reading`, rewards and credit in `learning`,
storage and serving in the server package. Times are Unix nanoseconds (`*_ns`), durations seconds (`*_s`).
Token ids are little-endian int32 and log-probabilities natural-log float32, on the wire and in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    TokenIds: TypeAlias = NDArray[np.int32]
    Logprobs: TypeAlias = NDArray[np.float32]
    Floats: TypeAlias = NDArray[np.float32]
    Indices: TypeAlias = NDArray[np.int32]
    Mask: TypeAlias = NDArray[np.bool_]

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
JsonObject: TypeAlias = "Mapping[str, Json]"
AttributeValue: TypeAlias = (
    "bool | int | float | str | bytes | Sequence[AttributeValue] | Mapping[str, AttributeValue] | None"
)
Attributes: TypeAlias = "Mapping[str, AttributeValue]"
Message: TypeAlias = "Mapping[str, Json]"
"""One chat message in OpenAI's chat-completions shape: role, content, tool_calls, tool_call_id, name."""


# --- work: what is to be run, and each try at it -------------------------------------------------


class Mode(StrEnum):
    """Why a rollout runs: to train on, to evaluate, or because somebody used the agent."""

    TRAIN = "train"
    VAL = "val"
    LIVE = "live"


class RolloutStatus(StrEnum):
    """QUEUED -> RUNNING -> one of the rest, which are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (RolloutStatus.SUCCEEDED, RolloutStatus.FAILED, RolloutStatus.CANCELLED)


class AttemptStatus(StrEnum):
    """RUNNING -> one of the rest. LOST: the lease ran out. TIMED_OUT: start-to-close ran out."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    LOST = "lost"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Task:
    """One input of a dataset. `input` is what the agent function receives."""

    id: str
    input: Json
    split: str = "train"


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how often one rollout may be tried."""

    start_to_close_s: float = 600.0
    max_attempts: int = 3


@dataclass(frozen=True, slots=True)
class Rollout:
    """One execution of an agent on one task. Rollouts that share `group_id` are compared with each other."""

    id: str
    task: Task | None
    group_id: str
    mode: Mode = Mode.TRAIN
    policy_version: int | None = None
    """Policy version when the rollout was enqueued; the versions that really sampled are on the calls."""
    limits: Limits = field(default_factory=Limits)
    status: RolloutStatus = RolloutStatus.QUEUED
    run_id: str | None = None
    """The training run that asked for it; None for live rollouts and ad-hoc ones."""
    created_ns: int = 0
    ended_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a rollout by one worker, fenced by its id: results of a superseded attempt are refused."""

    id: str
    rollout_id: str
    number: int
    """1 for the first try."""
    worker_id: str
    status: AttemptStatus = AttemptStatus.RUNNING
    lease_expires_ns: int = 0
    deadline_ns: int = 0
    started_ns: int = 0
    ended_ns: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """What a worker gets when it leases a rollout. `key` is the attempt's own API key, shown only here."""

    rollout: Rollout
    attempt: Attempt
    key: str
    model: str
    """Name of the policy to ask the gateway for."""


# --- spans: what happened, OTLP-shaped -----------------------------------------------------------


class SpanKind(StrEnum):
    """OTLP span kinds."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"
    PRODUCER = "producer"
    CONSUMER = "consumer"


class SpanStatus(StrEnum):
    """OTLP status codes."""

    UNSET = "unset"
    OK = "ok"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """A named moment inside a span."""

    name: str
    time_ns: int
    attributes: Attributes = field(default_factory=dict[str, "AttributeValue"])


@dataclass(frozen=True, slots=True)
class SpanLink:
    """A pointer to a related span, possibly of another trace."""

    trace_id: str
    span_id: str
    attributes: Attributes = field(default_factory=dict[str, "AttributeValue"])


@dataclass(frozen=True, slots=True)
class Span:
    """One unit of work as OTLP has it, plus the rollout and attempt it belongs to.

    `trace_id` is 32 and `span_id` 16 lower-case hex digits, neither all zero. `rollout_id` is None until
    known; the store derives it for live traces (see `live_rollout_id`).
    """

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    kind: SpanKind
    start_ns: int
    end_ns: int
    status: SpanStatus = SpanStatus.UNSET
    status_message: str = ""
    attributes: Attributes = field(default_factory=dict[str, "AttributeValue"])
    events: Sequence[SpanEvent] = ()
    links: Sequence[SpanLink] = ()
    resource: Attributes = field(default_factory=dict[str, "AttributeValue"])
    scope: str = ""
    """Name of the instrumentation scope that wrote it."""
    rollout_id: str | None = None
    attempt_id: str | None = None


def live_rollout_id(trace_id: str) -> str:
    """The id of the live rollout that a trace without a rollout belongs to; the same for every span of it."""
    return f"live-{trace_id}"


def live_attempt_id(trace_id: str) -> str:
    """The id of the only attempt of a live rollout."""
    return f"live-{trace_id}-1"


# --- typed views of spans, whatever dialect they were written in ---------------------------------


@dataclass(frozen=True, slots=True)
class LLMCall:
    """One model call: the adapter's span (who asked, why) joined with the gateway's (what was sampled).

    Token fields are None when no gateway of ours served the call. `logprobs` are those of the sampling
    distribution at `temperature`, of the policy version that sampled.
    """

    span_id: str
    """The adapter's span where there is one, else the gateway's."""
    gateway_span_id: str | None
    parent_id: str | None
    start_ns: int
    end_ns: int
    messages: Sequence[Message]
    output: Message | None
    tools: Sequence[JsonObject] = ()
    agent_name: str | None = None
    node_path: str | None = None
    model: str | None = None
    response_id: str | None = None
    finish_reason: str | None = None
    prompt_ids: TokenIds | None = None
    response_ids: TokenIds | None = None
    logprobs: Logprobs | None = None
    temperature: float = 1.0
    policy: str | None = None
    policy_version: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    malformed_tool_call: str | None = None
    """The text of a tool call that the gateway's parser could not read, if any."""
    response_schema: JsonObject | None = None
    """JSON schema that the text of the answer was to satisfy, if any."""

    def __hash__(self) -> int:
        """By span, so that a call can be a key; its messages have no hash."""
        return hash((self.span_id, self.gateway_span_id))


class ToolStatus(StrEnum):
    """How a tool call ended."""

    OK = "ok"
    RAISED = "raised"
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call that an agent made, with its outcome. `call_id` joins it to the model's request."""

    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int
    name: str
    arguments: Json
    """The parsed arguments, or the raw text where it does not parse."""
    result: Json = None
    status: ToolStatus = ToolStatus.OK
    error: str | None = None
    call_id: str | None = None
    agent_name: str | None = None


@dataclass(frozen=True, slots=True)
class AgentRun:
    """One invocation of a named agent (or graph, or crew)."""

    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int
    name: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Reward:
    """A finite number given to an attempt as a whole (`target` None) or to the call with span id `target`."""

    value: float
    name: str = "reward"
    target: str | None = None
    time_ns: int = 0
    span_id: str | None = None


# --- what is learned from ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transition:
    """One call of the policy: what it read, what it said, and what that was worth.

    Shapes: `prompt_ids` [P], `response_ids` [R], `logprobs` [R].
    """

    span_id: str
    prompt_ids: TokenIds
    response_ids: TokenIds
    logprobs: Logprobs
    messages: Sequence[Message]
    output: Message | None
    agent_name: str | None
    policy: str
    policy_version: int
    temperature: float = 1.0
    reward: float = 0.0
    """Intermediate reward of this very call (AIR and targeted rewards), before any credit assignment."""
    node_path: str | None = None
    finish_reason: str | None = None

    def __hash__(self) -> int:
        """By span, so that a transition can be a key; arrays have no hash."""
        return hash(self.span_id)


@dataclass(frozen=True, slots=True)
class Signal:
    """One intermediate reward of AIR: which rule gave what to which call, on whose evidence."""

    rule: str
    value: float
    call_span_id: str
    evidence_span_id: str


@dataclass(frozen=True, slots=True)
class Episode:
    """The policy's transitions of one attempt in call order, with what the attempt earned.

    `final_reward` is None when nobody gave one: such an episode is reported, never trained on as zero.
    """

    rollout_id: str
    attempt_id: str
    group_id: str
    task_id: str | None
    transitions: Sequence[Transition]
    final_reward: float | None
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    """Every named reward dimension, the final one included."""
    signals: Sequence[Signal] = ()
    calls: Sequence[LLMCall] = ()
    tool_calls: Sequence[ToolCall] = ()
    agent_runs: Sequence[AgentRun] = ()
    untrainable: Sequence[str] = ()
    """One sentence for each call of the policy that could not become a transition, saying why."""

    @property
    def total_return(self) -> float:
        """The final reward, 0 where there is none, plus the intermediate ones."""
        return (self.final_reward or 0.0) + sum(t.reward for t in self.transitions)


@dataclass(frozen=True, slots=True)
class Batch:
    """Token rows ready for a policy update. Rows are stored end to end (packed), R rows of N tokens in all.

    A row is one transition, or several of one episode whose tokens continue each other exactly. A token at
    position i > 0 of a row is predicted from those before it; `response_mask` marks the sampled ones.
    The policy loss is the sum over response tokens of `weights * clipped_surrogate(advantages)`; `weights`
    already hold the normalisation, and sum to 1 over a batch unless rows were dropped on purpose.
    """

    token_ids: TokenIds  # [N]
    row_offsets: Indices  # [R + 1], row r is token_ids[row_offsets[r]:row_offsets[r + 1]]
    response_mask: Mask  # [N]
    old_logprobs: Logprobs  # [N], 0 where response_mask is False
    advantages: Floats  # [N], 0 where response_mask is False
    rewards: Floats  # [N], a call's own reward at its last token, the final one at the episode's last; else 0
    weights: Floats  # [N], 0 where response_mask is False
    temperatures: Floats  # [N], of the call that sampled the token, 1 elsewhere
    transition_index: Indices  # [N], -1 where response_mask is False
    transition_episode: Indices  # [T], index of each transition's episode
    episode_group: Indices  # [E], index of each episode's group
    policy_versions: Indices  # [T]
    policy: str
    transitions: int
    episodes: int
    unmerged_tokens: int
    """Tokens the batch would have if every transition were a row of its own."""

    @property
    def rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def tokens(self) -> int:
        return len(self.token_ids)
