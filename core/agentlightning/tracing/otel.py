"""A tracer on OpenTelemetry's SDK: our spans also reach the application's own collectors.

The application's TracerProvider is used when it is an SDK one that samples everything, else one of our own:
a sampler that drops spans would drop training data. Only our spans go to our server, whatever else the
application traces. A span without a parent of ours starts a trace of its own, so that one run of an agent is
one live rollout, and links to the application's span around it.

What this is not: ambient. Nothing here attaches or detaches OpenTelemetry's context; parents are explicit.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags

from agentlightning import semconv
from agentlightning.context import SpanRef, current_rollout
from agentlightning.tracing.base import NO_ATTRIBUTES, SCOPE, Sender
from agentlightning.tracing.guard import warn
from agentlightning.tracing.light import default_resource, flushed
from agentlightning.tracing.values import clean_attributes, clean_text
from agentlightning.types import Attributes, AttributeValue, Span, SpanEvent, SpanKind, SpanLink, SpanStatus

_KINDS: Final = {kind: trace.SpanKind[kind.name] for kind in SpanKind}
_STATUSES: Final = {status: StatusCode[status.name] for status in SpanStatus}
_OUR_KINDS: Final = {theirs: ours for ours, theirs in _KINDS.items()}
_OUR_STATUSES: Final = {theirs: ours for ours, theirs in _STATUSES.items()}
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_NO_LIMITS: Final = SpanLimits(
    max_attributes=SpanLimits.UNSET,
    max_span_attributes=SpanLimits.UNSET,
    max_event_attributes=SpanLimits.UNSET,
    max_events=SpanLimits.UNSET,
    max_attribute_length=SpanLimits.UNSET,
    max_span_attribute_length=SpanLimits.UNSET,
)
_ATTRIBUTES: Final = 48  # more than any span of ours has
_SAMPLES_ALL: Final = ("AlwaysOnSampler", "ParentBased{root:AlwaysOnSampler")


class OTelSpan:
    """A span of `OTelTracer` that has started."""

    __slots__ = ("_span", "ref")

    def __init__(self, span: trace.Span, parent: SpanRef | None, rollout_id: str | None) -> None:
        context = span.get_span_context()
        trace_id, span_id = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
        self._span = span
        self.ref = SpanRef(trace_id, span_id, parent)
        self.ref.attached_rollout_id = rollout_id

    def set(self, attributes: Attributes) -> None:
        if not self.ref.closed:
            self._span.set_attributes(_attributes(attributes))

    def event(self, name: str, attributes: Attributes = NO_ATTRIBUTES, time_ns: int | None = None) -> None:
        if not self.ref.closed:
            self._span.add_event(clean_text(name), _attributes(attributes), time_ns)

    def end(
        self, status: SpanStatus = SpanStatus.UNSET, message: str = "", end_ns: int | None = None
    ) -> None:
        if self.ref.closed:
            return
        self.ref.closed = True
        if status is not SpanStatus.UNSET:
            described = clean_text(message) if status is SpanStatus.ERROR and message else None
            self._span.set_status(Status(_STATUSES[status], described))
        self._span.end(end_ns)


class OTelTracer:
    """Writes spans through OpenTelemetry; ours go to `sender` as well."""

    enabled = True

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._processor = OurSpans(sender)
        self._own = TracerProvider(
            resource=Resource(_attributes(default_resource())),
            sampler=ALWAYS_ON,
            span_limits=_NO_LIMITS,
            shutdown_on_exit=False,
        )
        self._own.add_span_processor(self._processor)
        self._provider: object = None
        self._tracers: dict[str, trace.Tracer] = {}
        self._lock = threading.Lock()

    @property
    def dropped(self) -> int:
        return self._sender.dropped

    def start_span(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: SpanRef | None = None,
        attributes: Attributes = NO_ATTRIBUTES,
        start_ns: int | None = None,
        scope: str = SCOPE,
    ) -> OTelSpan:
        identity = _identity()
        span = self._tracer(scope).start_span(
            clean_text(name),
            context=Context() if parent is None else _context(parent),
            kind=_KINDS[kind],
            attributes={**_attributes(attributes), **identity},
            links=_links() if parent is None else None,
            start_time=start_ns,
            record_exception=False,
        )
        return OTelSpan(span, parent, identity.get(semconv.ROLLOUT_ID))

    def flush(self, timeout_s: float = 5.0) -> bool:
        return flushed(self._sender, timeout_s)

    def shutdown(self) -> None:
        self._sender.shutdown(5.0)

    def _tracer(self, scope: str) -> trace.Tracer:
        provider = trace.get_tracer_provider()
        if provider is not self._provider:
            self._adopt(provider)
        tracer = self._tracers.get(scope)
        if tracer is None:
            tracer = self._tracers[scope] = self._chosen.get_tracer(scope)
        return tracer

    def _adopt(self, provider: object) -> None:
        """Use this provider from now on if it can carry our spans."""
        with self._lock:
            if provider is self._provider:
                return
            self._chosen = self._own
            if isinstance(provider, TracerProvider):
                loss = _loss(provider)
                if loss is None:
                    provider.add_span_processor(self._processor)
                    self._chosen = provider
                else:
                    warn(
                        "The application's TracerProvider %s. Our spans use a provider of their own, because "
                        "what is lost is lost training data; the application's collectors do not get them.",
                        loss,
                    )
            self._tracers = {}
            self._provider = provider


class OurSpans(SpanProcessor):
    """Hands the spans of our scopes to the sender, whatever else the application traces."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._resource: tuple[Resource, Attributes] | None = None

    def on_end(self, span: ReadableSpan) -> None:
        scope = span.instrumentation_scope
        if scope is not None and scope.name.startswith(SCOPE):
            self._sender.put(as_span(span, scope.name, self._attributes_of(span.resource)))

    def _attributes_of(self, resource: Resource) -> Attributes:
        """One object for all spans of a resource, so that the sender sees that it is the same."""
        if self._resource is None or self._resource[0] is not resource:
            self._resource = (resource, dict(resource.attributes))
        return self._resource[1]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._sender.flush(timeout_millis / 1000)

    def shutdown(self) -> None:
        self._sender.shutdown(5.0)


def as_span(span: ReadableSpan, scope: str, resource: Attributes) -> Span:
    """An ended span of the SDK's as ours; rollout and attempt stay among its attributes."""
    context = span.get_span_context()
    if context is None:
        raise ValueError("a span without a context cannot be sent")
    parent = span.parent
    status = span.status
    start_ns = span.start_time or 0
    return Span(
        trace_id=f"{context.trace_id:032x}",
        span_id=f"{context.span_id:016x}",
        parent_id=None if parent is None else f"{parent.span_id:016x}",
        name=span.name,
        kind=_OUR_KINDS[span.kind],
        start_ns=start_ns,
        end_ns=span.end_time or start_ns,
        status=_OUR_STATUSES[status.status_code],
        status_message=status.description or "",
        attributes=_plain(span.attributes),
        events=[SpanEvent(e.name, e.timestamp, _plain(e.attributes)) for e in span.events],
        links=[
            SpanLink(f"{k.context.trace_id:032x}", f"{k.context.span_id:016x}", _plain(k.attributes))
            for k in span.links
        ],
        resource=resource,
        scope=scope,
    )


def _plain(attributes: Mapping[str, Any] | None) -> dict[str, AttributeValue]:
    copy = getattr(attributes, "copy", None)  # of the SDK's mappings, in a third of the time
    return copy() if copy is not None else dict(attributes or {})


def _loss(provider: TracerProvider) -> str | None:
    """How the application's provider would lose spans or cut their texts; None when it does not."""
    sampler = provider.sampler.get_description()
    if not sampler.startswith(_SAMPLES_ALL):
        return f"samples ({sampler})"
    limits = getattr(provider, "_span_limits", None)  # not public: where it is gone, hope for the best
    longest = getattr(limits, "max_span_attribute_length", None)
    if longest is not None:
        return f"cuts attributes after {longest} characters"
    most = getattr(limits, "max_span_attributes", None)
    return f"keeps {most} attributes of a span" if most is not None and most < _ATTRIBUTES else None


def _attributes(attributes: Attributes) -> dict[str, Any]:
    return clean_attributes(attributes)


def _identity() -> dict[str, str]:
    active = current_rollout()
    if active is None:
        return {}
    return {semconv.ROLLOUT_ID: active.rollout_id, semconv.ATTEMPT_ID: active.attempt_id}


def _context(parent: SpanRef) -> Context:
    """OpenTelemetry's context with this span as the current one; made once for all its children."""
    if isinstance(parent.native, Context):
        return parent.native
    span_context = SpanContext(
        int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=False, trace_flags=_SAMPLED
    )
    context = trace.set_span_in_context(NonRecordingSpan(span_context), Context())
    parent.native = context
    return context


def _links() -> list[Link] | None:
    around = trace.get_current_span().get_span_context()
    return [Link(around)] if around.is_valid else None
