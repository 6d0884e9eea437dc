"""The seam between serving, training and whatever computes: `ServingEngine`, `Engine`, and their tokenizer.

An engine samples tokens from prompts of token ids and applies updates to its policies. It knows nothing of
HTTP, messages, rollouts or rewards. One update at a time; no policy changes while one of its generations is
under way, so every completion has exactly one policy version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from agentlightning.types import Batch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one completion."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy; its logprobs are those of temperature 1."""
    top_p: float = 1.0
    seed: int | None = None
    """The same seed, prompt and policy version give the same tokens, whatever else is being decoded,
    up to floating-point ties."""
    should_stop: Callable[[Sequence[int]], bool] | None = None
    """Asked after every token with all tokens so far; True ends with finish "stop"."""
    stop: Sequence[str] = ()
    """The texts that `should_stop` looks for, for engines that compute elsewhere and cannot be asked."""
    top_logprobs: int = 0
    """Alternatives to return for each position."""
    grammar: str | None = None
    """What the text must be: a Lark grammar as llguidance (and vLLM through it) reads them. It limits what
    is drawn, like top-p; logprobs stay those of the whole vocabulary."""
    session: str | None = None
    """Calls of one session begin alike: an engine of several replicas sends them to the same one."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled. The end-of-turn token, when sampled, is the last of `token_ids`."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """Natural log, under softmax(logits / temperature) before top-p truncation; as many as token_ids."""
    finish_reason: FinishReason
    policy_version: int
    top_logprobs: Sequence[Sequence[tuple[int, float]]] = field(default_factory=tuple)


class ChatTokenizer(Protocol):
    """What the gateway needs of a tokenizer; Hugging Face's fast tokenizers satisfy it."""

    chat_template: str | None
    eos_token: str
    eos_token_id: int

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


class ServingEngine(Protocol):
    """A model that serves: all that the gateway needs. `policy` names one of `policies`."""

    @property
    def tokenizer(self) -> ChatTokenizer: ...
    @property
    def base_model(self) -> str:
        """Human-readable name of the base model."""
        ...

    @property
    def policies(self) -> Sequence[str]:
        """Names that can be asked for; the first is the default."""
        ...

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and response together."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a turn."""
        ...

    def version(self, policy: str) -> int:
        """Number of updates applied to the policy."""
        ...

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, policy: str) -> Completion:
        """Sample one completion. Cancelling the awaiting task ends the generation within a step or two.

        Raises Unavailable when the queue is full or the engine is closed, PromptTooLong when no token fits,
        InvalidInput for a grammar that cannot be read.
        """
        ...

    def close(self) -> None:
        """End all generations and free the model."""
        ...


class Engine(ServingEngine, Protocol):
    """A model that serves and learns."""

    def update(self, batch: Batch) -> Mapping[str, float]:
        """Apply one update to `batch.policy` and return metrics. Blocks; waits for generations under way, and
        those asked for meanwhile wait for it.

        Raises NothingToLearn, with the policy as it was, when the batch has no difference to learn from.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write all that exact resume needs (weights, optimiser, versions, random state), atomically."""
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""
        ...

    def export(self, directory: Path, policy: str) -> None:
        """Write the policy as an ordinary Hugging Face model folder (or adapter folder)."""
        ...
