"""What is being decoded: requests, the lanes they share, and counts of the work done."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np

from agentlightning_server.engines.base import Completion, FinishReason, Sampling

from .cache import Row
from .grammar import Matcher
from .sampling import Ask, Draw


@dataclass(slots=True, eq=False)
class Request:
    """One completion to be sampled; `limit` is its most tokens."""

    prompt: list[int]
    sampling: Sampling
    limit: int
    random: np.random.Generator
    future: Future[Completion]
    matcher: Matcher | None = None
    """Follows the grammar of `sampling`, where it has one."""
    drawn: list[Draw] = field(default_factory=list[Draw])
    _uniform: float | None = None

    @property
    def uniform(self) -> float:
        """The uniform number of the next draw; the same until `give` uses it up."""
        if self._uniform is None:
            self._uniform = float(self.random.random())
        return self._uniform

    def give(self, drawn: Draw) -> None:
        """Append the next token."""
        self.drawn.append(drawn)
        self._uniform = None
        if self.matcher is not None:
            self.matcher.accept(drawn.token)

    def ask(self, row: int) -> Ask:
        """What it wants drawn from a row of the logits."""
        allowed = None if self.matcher is None else self.matcher.allowed()
        return Ask(row, self.sampling, self.uniform, allowed)

    @property
    def follows_others(self) -> bool:
        """Whether it would draw what an equal request drew with the same uniform number."""
        whole = self.sampling.temperature == 0 or self.sampling.top_p >= 1
        return whole and self.matcher is None and not self.sampling.top_logprobs

    def history(self) -> list[int]:
        return self.prompt + [d.token for d in self.drawn] if self.drawn else self.prompt

    def finish(self, reason: FinishReason, version: int) -> None:
        done = Completion(
            [d.token for d in self.drawn],
            [d.logprob for d in self.drawn],
            reason,
            version,
            [d.top for d in self.drawn] if self.sampling.top_logprobs else (),
        )
        settle(self.future, done)


@dataclass(slots=True, eq=False)
class Lane:
    """Requests that share a row, and the token that the row reads next."""

    row: Row
    reads: int
    requests: list[Request]

    @property
    def temperature(self) -> float:
        return self.requests[0].sampling.temperature

    def history(self) -> list[int]:
        """What the next token is drawn after."""
        return [*self.row.history(), self.reads]


@dataclass(slots=True)
class DecodeStats:
    """What decoding did since the engine started. Tokens of prompts are computed or reused; `rows` counts
    rows over steps, `drawn` tokens over steps, so drawn / rows is what sharing rows saved; `recalled` tokens
    cost no step at all."""

    computed: int = 0
    reused: int = 0
    steps: int = 0
    rows: int = 0
    drawn: int = 0
    recalled: int = 0
    parked: int = 0
    seconds: float = 0.0


def settle(future: Future[Completion], result: Completion | BaseException) -> None:
    """Answer a request that may have been cancelled meanwhile."""
    try:
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)
    except InvalidStateError:
        pass


def alike(requests: Iterable[Request]) -> list[list[Request]]:
    """Requests in groups of equal history and temperature, which read the same and draw from the same
    distribution."""
    groups: dict[tuple[tuple[int, ...], float], list[Request]] = {}
    for request in requests:
        groups.setdefault((tuple(request.history()), request.sampling.temperature), []).append(request)
    return list(groups.values())
