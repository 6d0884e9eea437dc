"""The SDK's own way to be added: a tracing processor.

It says which runs are recorded, those that the SDK traces, and makes one trace of the runs inside a `trace()`
of the SDK; what is written of a run is written by the wrapped functions, which see more than its spans hold.
"""

from __future__ import annotations

from typing import Any, Final

from agents.tracing import Span, Trace, TracingProcessor

from agentlightning.context import SpanRef, open_span, restore_open_span, set_open_span
from agentlightning.tracing import SpanHandle, get_tracer
from agentlightning.tracing.guard import guarded
from agentlightning_openai_agents.patches import install
from agentlightning_openai_agents.runs import SCOPE, Recording, current_run

_open_traces: Final[dict[str, tuple[SpanHandle, SpanRef | None]]] = {}
"""The span of each `trace()` of the user's, and what was open around it. Shared by all processors."""


class LightningTracingProcessor(TracingProcessor, Recording):
    """Records the runs that the SDK traces: `agents.add_trace_processor(LightningTracingProcessor())`.

    `agents.set_trace_processors([LightningTracingProcessor()])` also takes out the SDK's own exporter.
    """

    def __init__(self) -> None:
        self.active = True
        install()

    @guarded
    def on_trace_start(self, trace: Trace) -> None:
        if not self.active:
            return
        run = current_run()
        if run is not None:
            run.begin(self)
        elif trace.trace_id not in _open_traces and get_tracer().enabled:
            around = open_span()
            span = get_tracer().start_span(trace.name, parent=around, scope=SCOPE)
            _open_traces[trace.trace_id] = (span, around)
            set_open_span(span.ref)

    @guarded
    def on_trace_end(self, trace: Trace) -> None:
        span, around = _open_traces.pop(trace.trace_id, (None, None))
        if span is not None:
            restore_open_span(span.ref, around)
            span.end()

    def on_span_start(self, span: Span[Any]) -> None:  # noqa: ARG002
        """A run inside a trace that began before it has no start of a trace, only of its spans."""
        run = current_run()
        if run is not None and run.root is None and self.active:
            run.begin(self)

    def on_span_end(self, span: Span[Any]) -> None: ...

    def shutdown(self) -> None:
        """Nothing is held here; the tracer sends what is left when the process ends."""

    @guarded
    def force_flush(self) -> None:
        get_tracer().flush()
