"""Records CrewAI crews, agents and flows for Agent Lightning: one line, `agentlightning_crewai.instrument()`.

What this is not: part of the crew. It records model calls, tool calls and runs of CrewAI with its
OpenAI-compatible models, and tells our server which rollout a request belongs to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import crewai  # pyright: ignore[reportUnusedImport]  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"The CrewAI adapter needs CrewAI ({error}). Install it in the clone: pip install '.[crewai]'"
    ) from error

from agentlightning_crewai.instrumentation import instrument, uninstrument
from agentlightning_crewai.listener import LightningEventListener

if TYPE_CHECKING:
    from agentlightning_crewai.instrumentor import CrewAIInstrumentor

__all__ = ["CrewAIInstrumentor", "LightningEventListener", "instrument", "uninstrument"]


def __getattr__(name: str) -> Any:
    # Lazily: it needs OpenTelemetry's instrumentation package, which `instrument` does not.
    if name == "CrewAIInstrumentor":
        from agentlightning_crewai.instrumentor import CrewAIInstrumentor

        return CrewAIInstrumentor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
