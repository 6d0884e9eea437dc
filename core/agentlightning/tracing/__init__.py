"""Tracers: how spans are made and brought to the server. Importing this imports no OpenTelemetry."""

from agentlightning.tracing.base import NoTracer, SpanHandle, Tracer
from agentlightning.tracing.memory import capture_spans
from agentlightning.tracing.process import build_tracer, configure, get_tracer, set_tracer, trace

__all__ = [
    "NoTracer",
    "SpanHandle",
    "Tracer",
    "build_tracer",
    "capture_spans",
    "configure",
    "get_tracer",
    "set_tracer",
    "trace",
]
