"""Which rollout the running code belongs to, and which span is open around it.

Both are context variables: they follow `await`, `asyncio.gather` and the thread pools of the frameworks, so
that two rollouts in one process keep apart. Threads that a user starts by hand lose context variables; they
see the process-wide rollout, which a worker that runs one rollout at a time sets (`set_process_rollout`) or
its parent process passes down in the environment.

What this is not: OpenTelemetry's ambient context, which nothing here attaches or detaches.
Invariant: a span that has ended is never seen as open, even where a framework's hooks leave it behind.
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from agentlightning.types import live_rollout_id

if TYPE_CHECKING:
    from agentlightning.tracing.base import Tracer
    from agentlightning.types import Reward

T = TypeVar("T")

ENV_URL: Final = "AGENTLIGHTNING_URL"
ENV_KEY: Final = "AGENTLIGHTNING_KEY"
ENV_ROLLOUT_ID: Final = "AGENTLIGHTNING_ROLLOUT_ID"
ENV_ATTEMPT_ID: Final = "AGENTLIGHTNING_ATTEMPT_ID"
ENV_TRACER: Final = "AGENTLIGHTNING_TRACER"


@dataclass(frozen=True, slots=True)
class ActiveRollout:
    """The attempt that the running code is part of."""

    rollout_id: str
    attempt_id: str
    base_url: str = ""
    """Of the OpenAI-compatible API to call; the SDK patch sends our headers to its origin only."""
    api_key: str = field(default="", repr=False)
    model: str = ""
    tracer: Tracer | None = None
    """Where the spans of this rollout go; None for the process's own tracer."""
    report_reward: Callable[[Reward], None] | None = None
    """Takes the rewards that the agent emits; None to send them as spans."""


class SpanRef:
    """Names a span, as the parent of what happens under it; `closed` once it has ended."""

    __slots__ = (
        "agent_name",
        "attached_rollout_id",
        "closed",
        "is_agent_run",
        "native",
        "parent",
        "span_id",
        "trace_id",
    )

    def __init__(self, trace_id: str, span_id: str, parent: SpanRef | None = None) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent = parent
        self.agent_name: str | None = None
        """The agent at work in it, for the spans under it."""
        self.is_agent_run = False
        self.attached_rollout_id: str | None = None
        self.closed = False
        self.native: object = None
        """What the tracer itself needs to name it as a parent, once it has."""

    @property
    def rollout_id(self) -> str:
        """The rollout that the span belongs to; the live one of its trace where none was given."""
        return self.attached_rollout_id or live_rollout_id(self.trace_id)

    @property
    def traceparent(self) -> str:
        """The W3C trace context header, sampled."""
        return f"00-{self.trace_id}-{self.span_id}-01"


_rollout: contextvars.ContextVar[ActiveRollout | None] = contextvars.ContextVar(
    "agentlightning_rollout", default=None
)
_open_span: contextvars.ContextVar[SpanRef | None] = contextvars.ContextVar(
    "agentlightning_open_span", default=None
)
_process_rollout: ActiveRollout | None = None


@contextmanager
def use_rollout(active: ActiveRollout) -> Generator[ActiveRollout]:
    """Everything inside belongs to this attempt."""
    token = _rollout.set(active)
    try:
        yield active
    finally:
        _rollout.reset(token)


def set_process_rollout(active: ActiveRollout | None) -> None:
    """The rollout of code that no `use_rollout` reaches, such as threads started by hand; None for none."""
    global _process_rollout
    _process_rollout = active


def current_rollout() -> ActiveRollout | None:
    """The rollout of the running code: of the context, else of the process, else of the environment."""
    return _rollout.get() or _process_rollout or _rollout_from_environment()


def _rollout_from_environment() -> ActiveRollout | None:
    rollout_id = os.environ.get(ENV_ROLLOUT_ID)
    if not rollout_id:
        return None
    attempt_id = os.environ.get(ENV_ATTEMPT_ID)
    if not attempt_id:
        return None
    url = os.environ.get(ENV_URL, "").rstrip("/")
    return ActiveRollout(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        base_url=attempt_base_url(url, rollout_id, attempt_id) if url else "",
        api_key=os.environ.get(ENV_KEY, ""),
    )


def attempt_base_url(server_url: str, rollout_id: str, attempt_id: str) -> str:
    """The base URL that tells the gateway whose call it is without any header."""
    return f"{server_url.rstrip('/')}/rollouts/{rollout_id}/attempts/{attempt_id}/v1"


def open_span() -> SpanRef | None:
    """The innermost span around the running code that has not ended."""
    span = _open_span.get()
    while span is not None and span.closed:
        span = span.parent
    return span


def set_open_span(span: SpanRef | None) -> None:
    """For hooks that start and end a span in two calls. The caller puts the previous one back at the end."""
    _open_span.set(span)


def restore_open_span(ended: SpanRef, before: SpanRef | None) -> None:
    """Put back what was open before this span, unless the end came in another context than the start."""
    if _open_span.get() is ended:
        _open_span.set(before)


@contextmanager
def use_open_span(span: SpanRef) -> Generator[SpanRef]:
    """What happens inside happens under this span."""
    before = _open_span.get()
    _open_span.set(span)
    try:
        yield span
    finally:
        # Not `reset`: a generator that is closed by the garbage collector ends in another context.
        _open_span.set(before)


async def stream_under(span: SpanRef, stream: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """The stream, with the span open while it works and closed to its consumer in between."""
    try:
        while True:
            before = _open_span.get()
            _open_span.set(span)
            try:
                item = await anext(stream)
            except StopAsyncIteration:
                return
            finally:
                _open_span.set(before)
            yield item
    finally:
        await stream.aclose()
