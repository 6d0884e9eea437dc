"""OpenTelemetry spans of the server's own requests, for whoever operates it; off unless asked for.

They go to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names, through a provider of their own: they are not
spans of agents, and are not learned from.
"""

from __future__ import annotations

import os

from opentelemetry.trace import Tracer

from agentlightning._version import __version__
from agentlightning.errors import InvalidInput

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SERVICE = "agentlightning-server"


def request_tracer(enabled: bool) -> Tracer | None:
    """A tracer whose spans leave in the background; None when it is off.

    Raises InvalidInput without a collector.
    """
    if not enabled:
        return None
    if not any(os.environ.get(name) for name in ENDPOINTS):
        raise InvalidInput(
            f"the server's own traces have nowhere to go: set {ENDPOINTS[1]} to a collector's URL, "
            "or leave --trace-server off"
        )
    # Here, since most servers never need them.
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise InvalidInput(
            "the server's own traces need an exporter: install it with pip install '.[observe]'"
        ) from error
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": SERVICE, "service.version": __version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer(SERVICE, __version__)
