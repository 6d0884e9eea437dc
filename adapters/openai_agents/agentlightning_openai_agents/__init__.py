"""Records agents of the OpenAI Agents SDK for Agent Lightning, added in one line.

    agentlightning_openai_agents.instrument()                    # every run of the process
    agents.add_trace_processor(LightningTracingProcessor())      # every run that the SDK traces
    with record() as recording: await Runner.run(agent, "hi")    # these runs

What this is not: part of the agent. It records model calls, tool calls and agent runs, and tells our server
which rollout a request belongs to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import agents.tracing  # pyright: ignore[reportUnusedImport]  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"The OpenAI Agents adapter needs the OpenAI Agents SDK ({error}). "
        "Install it in the clone: pip install '.[openai-agents]'"
    ) from error

from agentlightning_openai_agents.instrumentation import instrument, record, uninstrument
from agentlightning_openai_agents.processor import LightningTracingProcessor
from agentlightning_openai_agents.runs import Recording

if TYPE_CHECKING:
    from agentlightning_openai_agents.instrumentor import OpenAIAgentsInstrumentor

__all__ = [
    "LightningTracingProcessor",
    "OpenAIAgentsInstrumentor",
    "Recording",
    "instrument",
    "record",
    "uninstrument",
]


def __getattr__(name: str) -> Any:
    # Lazily: it needs OpenTelemetry's instrumentation package, which `instrument` does not.
    if name == "OpenAIAgentsInstrumentor":
        from agentlightning_openai_agents.instrumentor import OpenAIAgentsInstrumentor

        return OpenAIAgentsInstrumentor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
