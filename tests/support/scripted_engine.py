"""An engine that says what it is told to, token by token, and notes what it was asked and what it said.

Scripts are queues by policy name, so that concurrent agents cannot take each other's lines: a test gives each
agent a model name of its own. A line is a text, an exception to raise, or `STALL`.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, Final

from agentlightning_server.engines.base import Completion, Engine, Sampling

STALL: Final = object()
"""No answer ever comes; `ScriptedEngine.stalled` has the policy once the request is there."""

Sampled = tuple[list[int], list[int], list[float]]
"""Prompt ids, response ids and logprobs."""


class Cut(str):
    """A text that ends at the token limit."""


def tool_call(name: str, **arguments: Any) -> str:
    """A tool call as the model writes it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class ScriptedEngine:
    """`engine.script["m"] += ["hi", RuntimeError("broke"), STALL]`; the tokenizer is that of `inner`."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self.script: defaultdict[str, deque[Any]] = defaultdict(deque)
        self.sampled: defaultdict[str, list[Sampled]] = defaultdict(list)
        self.stalled: set[str] = set()
        self.cancelled: set[str] = set()
        """Policies whose stalled request was given up by the one who asked."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def policies(self) -> Sequence[str]:
        return [*self._inner.policies, *self.script]

    def version(self, policy: str) -> int:
        return 0

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, policy: str) -> Completion:
        said = self.script[policy].popleft()
        if isinstance(said, Exception):
            raise said
        if said is STALL:
            await self._stall(policy)
        cut = isinstance(said, Cut)
        tokens = self.encode(said) if cut else [*self.encode(said), min(self._inner.eos_ids)]
        logprobs = [-0.5 - i / 8 for i in range(len(tokens))]
        self.sampled[policy].append((list(prompt_ids), tokens, logprobs))
        return Completion(tokens, logprobs, "length" if cut else "stop", 0)

    def encode(self, text: str) -> list[int]:
        """The tokens in which a line is said."""
        return self._inner.tokenizer.encode(text, add_special_tokens=False)

    async def _stall(self, policy: str) -> None:
        self.stalled.add(policy)
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.add(policy)
