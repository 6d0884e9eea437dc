"""The adapter as an OpenTelemetry instrumentor, for `opentelemetry-instrument python agent.py`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor

from agentlightning_langchain.handler import instrument, uninstrument


class LangChainInstrumentor(BaseInstrumentor):
    """`LangChainInstrumentor().instrument()` is `agentlightning_langchain.instrument()`."""

    def instrumentation_dependencies(self) -> Collection[str]:
        return ("langchain-core >= 0.3",)

    def _instrument(self, **kwargs: Any) -> None:  # noqa: ARG002
        instrument()

    def _uninstrument(self, **kwargs: Any) -> None:  # noqa: ARG002
        uninstrument()
