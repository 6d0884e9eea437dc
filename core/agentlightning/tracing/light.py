"""A tracer without OpenTelemetry in the process: plain objects, sent as OTLP/JSON by a background thread.

What this is not: a part of the application's own telemetry; its collectors see none of these spans.
Invariant: starting and ending a span takes no lock that the network holds.
"""

from __future__ import annotations

import os
import random
import time

from agentlightning.context import SpanRef, current_rollout
from agentlightning.tracing.base import NO_ATTRIBUTES, SCOPE, Sender
from agentlightning.tracing.guard import warn
from agentlightning.tracing.values import clean_attributes, clean_text
from agentlightning.types import Attributes, AttributeValue, Span, SpanEvent, SpanKind, SpanStatus


class LightSpan:
    """A span of `LightTracer` that has started."""

    __slots__ = (
        "_attributes",
        "_events",
        "_identity",
        "_kind",
        "_name",
        "_parent",
        "_start",
        "_tracer",
        "ref",
    )

    def __init__(
        self,
        tracer: LightTracer,
        ref: SpanRef,
        name: str,
        kind: SpanKind,
        parent_id: str | None,
        attributes: dict[str, AttributeValue],
        start: tuple[int, str],
    ) -> None:
        self.ref = ref
        self._tracer = tracer
        self._name = name
        self._kind = kind
        self._parent = parent_id
        self._attributes = attributes
        self._events: list[SpanEvent] = []
        self._start = start
        active = current_rollout()
        self._identity = (None, None) if active is None else (active.rollout_id, active.attempt_id)
        ref.attached_rollout_id = self._identity[0]

    def set(self, attributes: Attributes) -> None:
        if not self.ref.closed:
            self._attributes.update(clean_attributes(attributes))

    def event(self, name: str, attributes: Attributes = NO_ATTRIBUTES, time_ns: int | None = None) -> None:
        if not self.ref.closed:
            when = time_ns or time.time_ns()
            self._events.append(SpanEvent(clean_text(name), when, clean_attributes(attributes)))

    def end(
        self, status: SpanStatus = SpanStatus.UNSET, message: str = "", end_ns: int | None = None
    ) -> None:
        if self.ref.closed:
            return
        self.ref.closed = True
        start_ns, scope = self._start
        rollout_id, attempt_id = self._identity
        self._tracer.sender.put(
            Span(
                trace_id=self.ref.trace_id,
                span_id=self.ref.span_id,
                parent_id=self._parent,
                name=self._name,
                kind=self._kind,
                start_ns=start_ns,
                end_ns=end_ns or time.time_ns(),
                status=status,
                status_message=clean_text(message) if status is SpanStatus.ERROR else "",
                attributes=self._attributes,
                events=self._events,
                resource=self._tracer.resource,
                scope=scope,
                rollout_id=rollout_id,
                attempt_id=attempt_id,
            )
        )


class LightTracer:
    """Writes spans as plain objects and hands them to `sender`."""

    enabled = True

    def __init__(self, sender: Sender, resource: Attributes | None = None) -> None:
        self.sender = sender
        self.resource: Attributes = default_resource() if resource is None else resource

    @property
    def dropped(self) -> int:
        return self.sender.dropped

    def start_span(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: SpanRef | None = None,
        attributes: Attributes = NO_ATTRIBUTES,
        start_ns: int | None = None,
        scope: str = SCOPE,
    ) -> LightSpan:
        trace_id = _random_hex(128) if parent is None else parent.trace_id
        return LightSpan(
            self,
            SpanRef(trace_id, _random_hex(64), parent),
            clean_text(name),
            kind,
            None if parent is None else parent.span_id,
            clean_attributes(attributes),
            (start_ns or time.time_ns(), scope),
        )

    def flush(self, timeout_s: float = 5.0) -> bool:
        return flushed(self.sender, timeout_s)

    def shutdown(self) -> None:
        self.sender.shutdown(5.0)


def flushed(sender: Sender, timeout_s: float) -> bool:
    """Flush; a warning where the time did not do."""
    sent = sender.flush(timeout_s)
    if not sent:
        warn("Not all spans were sent within %.1f s. Is the server reachable?", timeout_s)
    return sent


def default_resource() -> dict[str, AttributeValue]:
    """The resource of spans that no application's own telemetry describes."""
    return {"service.name": clean_text(os.environ.get("OTEL_SERVICE_NAME") or "agent")}


# Of our own: an agent that seeds the shared generator would repeat its trace ids in each attempt. Not
# the system's, which costs a system call for each id; seeded from it instead, and again in a forked child.
_ids = random.Random(os.urandom(32))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _ids.seed(os.urandom(32)))


def _random_hex(bits: int) -> str:
    return f"{_ids.getrandbits(bits) or 1:0{bits // 4}x}"
