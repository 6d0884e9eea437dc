"""What a tracer is: the small protocol that the adapters write to, and the tracer that does nothing.

What this is not: a choice of how spans travel; `OTelTracer` and `LightTracer` make it,
and write the same spans.
Invariant: nothing here raises into the caller or waits for the network, except `flush` and `shutdown`, which
wait no longer than they are told.
"""

# ruff: noqa: ARG002 (a protocol and its null object take what they do not use)
from __future__ import annotations

from types import MappingProxyType
from typing import Final, Protocol

from agentlightning.context import SpanRef
from agentlightning.types import Attributes, AttributeValue, Span, SpanKind, SpanStatus

SCOPE: Final = "agentlightning"
NO_ATTRIBUTES: Final[Attributes] = MappingProxyType(dict[str, "AttributeValue"]())


class SpanHandle(Protocol):
    """A span that has started. After `end` every call is ignored."""

    @property
    def ref(self) -> SpanRef:
        """The span's ids, for its children."""
        ...

    def set(self, attributes: Attributes) -> None:
        """Add attributes; None values are left out."""
        ...

    def event(self, name: str, attributes: Attributes = NO_ATTRIBUTES, time_ns: int | None = None) -> None:
        """Record a named moment, now unless `time_ns` says when."""
        ...

    def end(
        self, status: SpanStatus = SpanStatus.UNSET, message: str = "", end_ns: int | None = None
    ) -> None:
        """End the span, now unless `end_ns` says when, and hand it to the sender."""
        ...


class Tracer(Protocol):
    """Starts spans and sends them to the server in the background."""

    def start_span(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: SpanRef | None = None,
        attributes: Attributes = NO_ATTRIBUTES,
        start_ns: int | None = None,
        scope: str = SCOPE,
    ) -> SpanHandle:
        """Start a span under `parent`, or a new trace without one. Times are Unix nanoseconds.

        `scope` names the instrumentation and begins with "agentlightning".

        The span carries the ids of the running rollout, when there is one.
        """
        ...

    @property
    def enabled(self) -> bool:
        """False when spans go nowhere, so that building them is wasted work."""
        ...

    @property
    def dropped(self) -> int:
        """Spans given up so far: the queue was full, or the server refused them or stayed away."""
        ...

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Send what is waiting; True when all of it was sent in time."""
        ...

    def shutdown(self) -> None:
        """Flush for at most 5 s, then stop. Later spans are ignored."""
        ...


class Sender(Protocol):
    """Takes finished spans off the agent's hands."""

    @property
    def dropped(self) -> int: ...

    def put(self, span: Span) -> None:
        """Take a span; never waits."""
        ...

    def flush(self, timeout_s: float) -> bool:
        """True when everything was sent in time."""
        ...

    def shutdown(self, timeout_s: float) -> None:
        """Flush within the time, then stop."""
        ...


class _NoSpan:
    """Takes everything and keeps nothing."""

    __slots__ = ("ref",)

    def __init__(self) -> None:
        self.ref = SpanRef("0" * 32, "0" * 16)
        self.ref.closed = True

    def set(self, attributes: Attributes) -> None: ...

    def event(
        self, name: str, attributes: Attributes = NO_ATTRIBUTES, time_ns: int | None = None
    ) -> None: ...

    def end(
        self, status: SpanStatus = SpanStatus.UNSET, message: str = "", end_ns: int | None = None
    ) -> None: ...


NO_SPAN: Final = _NoSpan()


class NoTracer:
    """The tracer of a process without a server: costs nothing."""

    enabled = False
    dropped = 0

    def start_span(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: SpanRef | None = None,
        attributes: Attributes = NO_ATTRIBUTES,
        start_ns: int | None = None,
        scope: str = SCOPE,
    ) -> SpanHandle:
        return NO_SPAN

    def flush(self, timeout_s: float = 5.0) -> bool:
        return True

    def shutdown(self) -> None: ...
