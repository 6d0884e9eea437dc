"""The adapter as an OpenTelemetry instrumentor, for `opentelemetry-instrument python agent.py`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

from agentlightning_openai_agents.instrumentation import instrument, uninstrument


class OpenAIAgentsInstrumentor(BaseInstrumentor):
    """`OpenAIAgentsInstrumentor().instrument()` is `agentlightning_openai_agents.instrument()`."""

    def instrumentation_dependencies(self) -> Collection[str]:
        return ("openai-agents >= 0.20",)

    def _instrument(self, **kwargs: Any) -> None:  # noqa: ARG002
        instrument()

    def _uninstrument(self, **kwargs: Any) -> None:  # noqa: ARG002
        uninstrument()
