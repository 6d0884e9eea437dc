"""The adapter as an OpenTelemetry instrumentor, for `opentelemetry-instrument python crew.py`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

from agentlightning_crewai.instrumentation import instrument, uninstrument


class CrewAIInstrumentor(BaseInstrumentor):
    """`CrewAIInstrumentor().instrument()` is `agentlightning_crewai.instrument()`."""

    def instrumentation_dependencies(self) -> Collection[str]:
        return ("crewai >= 1.15",)

    def _instrument(self, **kwargs: Any) -> None:  # noqa: ARG002
        instrument()

    def _uninstrument(self, **kwargs: Any) -> None:  # noqa: ARG002
        uninstrument()
