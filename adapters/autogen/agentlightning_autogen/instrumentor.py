"""The adapter as an OpenTelemetry instrumentor, for `opentelemetry-instrument python agent.py`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

from agentlightning_autogen.instrumentation import instrument, uninstrument


class AutoGenInstrumentor(BaseInstrumentor):
    """`AutoGenInstrumentor().instrument()` is `agentlightning_autogen.instrument()`."""

    def instrumentation_dependencies(self) -> Collection[str]:
        return ("autogen-agentchat >= 0.7", "autogen-ext >= 0.7")

    def _instrument(self, **kwargs: Any) -> None:  # noqa: ARG002
        instrument()

    def _uninstrument(self, **kwargs: Any) -> None:  # noqa: ARG002
        uninstrument()
