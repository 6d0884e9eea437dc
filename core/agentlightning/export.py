"""Stored rollouts, or a plain OTLP file, as rows for other tools: one per model call, in order.

A call of the policy with its token ids is a transition, and its row is exact. Other calls (another model's,
or any call that no gateway of ours served) have messages and rewards only; they become rows where they are
asked for, with `exact` false and no token ids, so that nobody trains on re-tokenised text by mistake.

What this is not: the batch of an update (`learning.batching`), or the reader of spans (`reading`).
Invariant: the rows of a run are a pure function of its stored spans.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from agentlightning.bridge import counts, deciding_attempt
from agentlightning.doctor import Recorded
from agentlightning.errors import InvalidInput, InvalidSpans
from agentlightning.learning import AIR, Credit, Selector, apply_air, identical, select
from agentlightning.otlp import spans_from_request
from agentlightning.reading import read_episode, read_trace
from agentlightning.tracing.values import clean_text
from agentlightning.types import (
    Attempt,
    AttemptStatus,
    Episode,
    LLMCall,
    Mode,
    Rollout,
    RolloutStatus,
    Span,
    Transition,
    live_attempt_id,
    live_rollout_id,
)

if TYPE_CHECKING:
    from agentlightning.types import Floats, Logprobs, TokenIds

Row: TypeAlias = "dict[str, Any]"
_NO_VERSION: Final = -1  # of a call that no policy of ours answered
_GZIP: Final = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """Which calls become rows, and what they are worth."""

    air: AIR | None = None
    select: Selector | None = None
    """Which calls; None takes all."""
    credit: Credit = identical
    reward_weights: Mapping[str, float] | None = None
    all_calls: bool = False
    """Also calls without exact token ids."""


@dataclass(slots=True)
class Report:
    """What became of the calls, counted while the rows are made."""

    exact: int = 0
    inexact: int = 0
    """Rows without token ids."""
    left_out: int = 0
    """Calls without token ids that were not asked for."""
    unselected: int = 0
    problems: Counter[str] = field(default_factory=Counter[str])


def transition_rows(recorded: Iterable[Recorded], settings: ExportSettings, report: Report) -> Iterator[Row]:
    """One row per call, rollout by rollout. Rollouts that cannot be read are counted in the report."""
    for record in recorded:
        attempt = deciding_attempt(record.attempts)
        if attempt is None or not counts(record.rollout):
            report.problems[f"rollout {record.rollout.status}"] += 1
            continue
        try:
            episode = read_episode(
                record.rollout, attempt, record.spans, reward_weights=settings.reward_weights
            )
        except InvalidInput as error:
            report.problems[str(error)] += 1
            continue
        yield from _episode_rows(record, episode, settings, report)


def _episode_rows(
    record: Recorded, episode: Episode, settings: ExportSettings, report: Report
) -> Iterator[Row]:
    exact = {transition.span_id for transition in episode.transitions}
    inexact = [call for call in episode.calls if call.span_id not in exact]
    if settings.all_calls:
        episode = _with_all_calls(episode, inexact, record.spans)
    else:
        report.left_out += len(inexact)
        for sentence in episode.untrainable:
            report.problems[sentence.split(": ", 1)[-1]] += 1
    shaped = apply_air(episode, settings.air) if settings.air else episode
    chosen = select(shaped, settings.select) if settings.select else shaped
    report.unselected += len(shaped.transitions) - len(chosen.transitions)
    returns = settings.credit(chosen) if chosen.final_reward is not None else None
    calls = {call.span_id: (step, call) for step, call in reversed(list(enumerate(episode.calls)))}
    for index, transition in enumerate(chosen.transitions):
        step, call = calls[transition.span_id]
        is_exact = transition.span_id in exact
        report.exact += is_exact
        report.inexact += not is_exact
        worth = None if returns is None else _number(float(returns[index]))
        yield _row(record.rollout, chosen, transition, call, step, worth, exact=is_exact)


def _with_all_calls(episode: Episode, inexact: Sequence[LLMCall], spans: Sequence[Span]) -> Episode:
    """The episode with the calls that are no transitions as if they were, in their places."""
    rewards = [reward for reward in read_trace(spans).rewards if reward.target is not None]
    given = {
        call.span_id: sum(r.value for r in rewards if r.target in (call.span_id, call.gateway_span_id))
        for call in inexact
    }
    exact: dict[str, list[Transition]] = {}
    for transition in episode.transitions:
        exact.setdefault(transition.span_id, []).append(transition)
    transitions: list[Transition] = []
    for call in episode.calls:
        if call.span_id in given:
            transitions.append(_as_transition(call, given[call.span_id]))
        elif exact.get(call.span_id):
            transitions.append(exact[call.span_id].pop(0))  # one for each choice that was asked for
    return replace(episode, transitions=transitions)


def _as_transition(call: LLMCall, reward: float) -> Transition:
    return Transition(
        span_id=call.span_id,
        prompt_ids=np.zeros(0, np.int32),
        response_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        messages=call.messages,
        output=call.output,
        agent_name=call.agent_name,
        policy=call.policy or "",
        policy_version=_NO_VERSION if call.policy_version is None else call.policy_version,
        temperature=call.temperature,
        reward=reward,
        node_path=call.node_path,
        finish_reason=call.finish_reason,
    )


def _row(
    rollout: Rollout,
    episode: Episode,
    transition: Transition,
    call: LLMCall,
    step: int,
    worth: float | None,
    *,
    exact: bool,
) -> Row:
    return {
        "rollout_id": episode.rollout_id,
        "attempt_id": episode.attempt_id,
        "group_id": episode.group_id,
        "task_id": episode.task_id,
        "mode": str(rollout.mode),
        "step": step,
        "span_id": transition.span_id,
        "agent_name": transition.agent_name,
        "node_path": transition.node_path,
        "model": call.model,
        "policy": transition.policy if exact else call.policy,
        "policy_version": transition.policy_version if exact else call.policy_version,
        "messages": list(transition.messages),
        "tools": list(call.tools),
        "output": transition.output,
        "exact": exact,
        "prompt_ids": _ids(transition.prompt_ids) if exact else None,
        "response_ids": _ids(transition.response_ids) if exact else None,
        "logprobs": _logprobs(transition.logprobs) if exact else None,
        "temperature": transition.temperature,
        "finish_reason": transition.finish_reason,
        "error": call.error,
        "reward": _number(transition.reward),
        "return": worth,
        "final_reward": episode.final_reward,
    }


def row_to_json(row: Row) -> str:
    """One line of JSON."""
    return clean_text(json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=str))


def _ids(ids: TokenIds) -> list[int]:
    return ids.tolist()


def _logprobs(values: Logprobs) -> list[float | None]:
    """The shortest decimals that are the same float32 again."""
    return [_number(value) for value in values]


def _number(value: float | Floats) -> float | None:
    number = float(str(np.float32(value)))  # not 0.10000000149011612 for 0.1
    return number if math.isfinite(number) else None


# --- OTLP files ----------------------------------------------------------------------------------


def spans_from_file(path: Path) -> list[Span]:
    """The spans of a file of OTLP/JSON: one request, or one a line as the Collector's file exporter writes.

    Either may be compressed with gzip. Raises InvalidSpans naming the file and, where there are lines, the
    line.
    """
    text = _text(path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _spans_from_lines(path, text, error)
    return _spans(whole, str(path))


def _spans_from_lines(path: Path, text: str, error: Exception) -> list[Span]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InvalidSpans(f"{path} is empty: write OTLP/JSON traces, one request or one a line")
    if not lines[0][1].lstrip().startswith("{"):
        raise InvalidSpans(f"{path} is not OTLP/JSON ({error}); protobuf is not read here")
    spans: list[Span] = []
    for number, line in lines:
        place = f"{path}, line {number}"
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as broken:
            hint = "; the last line of a file that is still written?" if number == lines[-1][0] else ""
            raise InvalidSpans(f"{place} is not JSON: {broken}{hint}") from broken
        spans += _spans(request, place)
    return spans


def _spans(request: object, place: str) -> list[Span]:
    try:
        return spans_from_request(request)
    except InvalidSpans as error:
        raise InvalidSpans(f"{place}: {error}") from error


def _text(path: Path) -> str:
    try:
        body = path.read_bytes()
        return (gzip.decompress(body) if body.startswith(_GZIP) else body).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidSpans(
            f"{path} is not UTF-8 text (byte {error.start}); protobuf is not read here"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidSpans(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise InvalidSpans(f"cannot read {path}: {error.strerror}") from error


def recorded_from_spans(spans: Sequence[Span]) -> list[Recorded]:
    """Rollouts from spans alone, oldest first.

    A span belongs to the rollout it names, else to the live one of its trace. Traces that hold the same
    response of a model are one: an instrumented client below an instrumented framework may start its own.
    """
    traces: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.start_ns, span.span_id)):
        traces.setdefault(span.rollout_id or live_rollout_id(span.trace_id), []).append(span)
    return [_recorded(rollout_id, own) for rollout_id, own in _united(traces).items()]


def _united(traces: Mapping[str, list[Span]]) -> dict[str, list[Span]]:
    """Traces that no rollout named, the later ones added to the first one with the same response."""
    united: dict[str, list[Span]] = {}
    first: dict[str, str] = {}
    for rollout_id, spans in traces.items():
        trace = read_trace(spans)
        calls = [*trace.adapter_calls, *trace.gateway_calls]
        responses = {call.response_id for call in calls if call.response_id}
        named = any(span.rollout_id is not None for span in spans)
        home = rollout_id if named else next((first[r] for r in responses if r in first), rollout_id)
        united.setdefault(home, []).extend(spans)
        if not named:
            first |= {response: home for response in responses if response not in first}
    return united


def _recorded(rollout_id: str, spans: Sequence[Span]) -> Recorded:
    attempts = list(dict.fromkeys(span.attempt_id for span in spans if span.attempt_id is not None))
    if not attempts:
        live = rollout_id == live_rollout_id(spans[0].trace_id)
        attempts = [live_attempt_id(spans[0].trace_id) if live else f"{rollout_id}-1"]
    rollout = Rollout(
        rollout_id,
        None,
        rollout_id,
        Mode.LIVE,
        status=RolloutStatus.SUCCEEDED,
        created_ns=spans[0].start_ns,
    )
    made = [
        Attempt(attempt_id, rollout_id, number, "file", AttemptStatus.SUCCEEDED)
        for number, attempt_id in enumerate(attempts, 1)
    ]
    return Recorded(rollout, made, spans)
