"""A tracer on OpenTelemetry's SDK: our spans also reach the application's own collectors.

The application's TracerProvider is used when it is an SDK one that samples everything, else one of our own:
a sampler that drops spans would drop training data. Only our spans go to our server, whatever else the
application traces. A span without a parent of ours starts a trace of its own, so that one run of an agent is
one live rollout, and links to the application's span around it.

What this is not: ambient. Nothing here attaches or detaches OpenTelemetry's context; parents are explicit.
"""

from __future__ import annotations

import atexit
import gzip
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags

from agentlightning import semconv
from agentlightning.context import SpanRef, current_rollout
from agentlightning.errors import InvalidInput
from agentlightning.tracing.base import NO_ATTRIBUTES, SCOPE
from agentlightning.tracing.guard import warn
from agentlightning.tracing.light import default_resource
from agentlightning.tracing.sender import (
    COMPRESSION,
    DELAY_S,
    EXIT_TIMEOUT_S,
    MAX_BATCH,
    MAX_QUEUE,
    REQUEST_TIMEOUT_S,
    worth_compressing,
)
from agentlightning.tracing.values import clean_attributes, clean_text
from agentlightning.types import Attributes, SpanKind, SpanStatus

MAX_REQUEST_BYTES: Final = 4 * 2**20  # the server takes 20 MiB; texts may need more bytes than characters
_KINDS: Final = {kind: trace.SpanKind[kind.name] for kind in SpanKind}
_STATUSES: Final = {status: StatusCode[status.name] for status in SpanStatus}
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
_SENT_HEADERS: Final = frozenset(
    {"content-type", "content-encoding", "content-length", "user-agent", "accept", "accept-encoding"}
)
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
    """Writes spans through OpenTelemetry and sends ours to the server.

    `exporter` replaces the OTLP/HTTP one that posts protobuf to `{url}/v1/traces`.
    """

    enabled = True

    def __init__(self, url: str = "", key: str = "", *, exporter: SpanExporter | None = None) -> None:
        self._processor = OurSpans(exporter or _http_exporter(url, key))
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
        weak = weakref.ref(self)
        atexit.register(lambda: (living := weak()) and living.shutdown())

    @property
    def dropped(self) -> int:
        return self._processor.dropped

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
        sent = _within(timeout_s, self._processor.force_flush)
        if not sent:
            warn("Not all spans were sent within %.1f s. Is the server reachable?", timeout_s)
        return sent

    def shutdown(self) -> None:
        if not _within(EXIT_TIMEOUT_S, self._processor.shutdown):
            warn("Some spans were not sent before the tracer stopped. Is the server reachable?")

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
    """Batches the spans of our scopes for the server, and counts those that did not get there."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = _CountingExporter(exporter)
        self._batch = BatchSpanProcessor(
            self._exporter,
            max_queue_size=MAX_QUEUE,
            schedule_delay_millis=1000 * DELAY_S,
            max_export_batch_size=MAX_BATCH,
        )
        self._accepted = 0
        self._overflow = 0
        self._stopped = False

    @property
    def dropped(self) -> int:
        return self._overflow + self._exporter.failed

    def on_end(self, span: ReadableSpan) -> None:
        scope = span.instrumentation_scope
        if self._stopped or scope is None or not scope.name.startswith(SCOPE):
            return
        self._accepted += 1
        if self._accepted - self._overflow - self._exporter.handled > MAX_QUEUE + MAX_BATCH:
            self._overflow += 1  # the batch processor drops its oldest span for this one
        self._batch.on_end(span)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._stopped or self._batch.force_flush(timeout_millis)

    def shutdown(self) -> None:
        self._stopped = True
        self._batch.shutdown()


class _CountingExporter(SpanExporter):
    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self.handled = 0
        self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        results = [self._export(part) for part in _parts(spans)]
        succeeded = all(result is SpanExportResult.SUCCESS for result in results)
        return SpanExportResult.SUCCESS if succeeded else SpanExportResult.FAILURE

    def _export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._inner.export(spans)
        finally:
            self.handled += len(spans)
            if result is not SpanExportResult.SUCCESS:
                self.failed += len(spans)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()


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


def _parts(spans: Sequence[ReadableSpan]) -> Iterator[Sequence[ReadableSpan]]:
    """The spans in requests of about MAX_REQUEST_BYTES, for a batch is counted in spans, not bytes."""
    part: list[ReadableSpan] = []
    size = 0
    for span in spans:
        values = (span.attributes or {}).values()
        more = sum(len(value) for value in values if isinstance(value, (str, bytes)))
        if part and size + more > MAX_REQUEST_BYTES:
            yield part
            part, size = [], 0
        part.append(span)
        size += more
    if part:
        yield part


def _http_exporter(url: str, key: str) -> SpanExporter:
    if not url.startswith(("http://", "https://")):
        raise InvalidInput(f"The server's URL must begin with http:// or https://, not {url!r}.")
    # Here and not at the top: it takes 150 ms to import, which a process without a server should not pay.
    from opentelemetry.exporter.otlp.proto.http import Compression
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(
        endpoint=url.rstrip("/") + "/v1/traces",
        compression=Compression.NoCompression,  # the session does it, several times faster
        timeout=REQUEST_TIMEOUT_S,
        session=_session(key, compress=worth_compressing(url)),
    )


def _session(key: str, *, compress: bool) -> Any:
    """An HTTP session that sends our key and none of the credentials for the application's own collector.

    The exporter adds OTEL_EXPORTER_OTLP_HEADERS to every request, and requests adds what ~/.netrc has.
    """
    import requests

    class OurSession(requests.Session):
        def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
            for name in [name for name in request.headers if name.lower() not in _SENT_HEADERS]:
                del request.headers[name]
            if compress and isinstance(request.body, bytes):
                request.body = gzip.compress(request.body, compresslevel=COMPRESSION)
                request.headers["Content-Encoding"] = "gzip"
                request.headers["Content-Length"] = str(len(request.body))
            if key:
                request.headers["Authorization"] = f"Bearer {key}"
            kwargs["allow_redirects"] = False  # they would take the key elsewhere
            response = super().send(request, **kwargs)
            if 300 <= response.status_code < 400:  # which the exporter takes for success
                response.status_code = 400
                response.reason = f"redirects to {response.headers.get('location')}: name that URL instead"
            return response

    return OurSession()


def _attributes(attributes: Attributes) -> dict[str, Any]:
    return clean_attributes(attributes)


def _identity() -> dict[str, str]:
    active = current_rollout()
    if active is None:
        return {}
    return {semconv.ROLLOUT_ID: active.rollout_id, semconv.ATTEMPT_ID: active.attempt_id}


def _context(parent: SpanRef) -> Context:
    span_context = SpanContext(
        int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=False, trace_flags=_SAMPLED
    )
    return trace.set_span_in_context(NonRecordingSpan(span_context), Context())


def _links() -> list[Link] | None:
    around = trace.get_current_span().get_span_context()
    return [Link(around)] if around.is_valid else None


def _within(timeout_s: float, work: Any) -> bool:
    """Run it, but wait no longer than this: the SDK's flush and shutdown exceed their own timeouts."""
    done = threading.Event()

    def run() -> None:
        work()
        done.set()

    try:
        threading.Thread(target=run, name="agentlightning-flush", daemon=True).start()
    except RuntimeError:  # the interpreter is shutting down and starts no threads any more
        run()
    return done.wait(timeout_s)
