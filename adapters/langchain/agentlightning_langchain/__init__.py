"""Records LangChain and LangGraph agents for Agent Lightning: one callback handler, added in one line.

    agent.invoke(..., config={"callbacks": [LightningCallbackHandler()]})   # this run
    agentlightning_langchain.instrument()                                   # every run of the process

What this is not: part of the agent. It records model calls, tool calls and agent runs, and tells our server
which rollout a request belongs to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import langchain_core.callbacks  # pyright: ignore[reportUnusedImport]  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"The LangChain adapter needs LangChain ({error}). "
        "Install it in the clone: pip install '.[langchain]'"
    ) from error

from agentlightning_langchain.handler import LightningCallbackHandler, instrument, uninstrument

if TYPE_CHECKING:
    from agentlightning_langchain.instrumentor import LangChainInstrumentor

__all__ = ["LangChainInstrumentor", "LightningCallbackHandler", "instrument", "uninstrument"]


def __getattr__(name: str) -> Any:
    # Lazily: it needs OpenTelemetry's instrumentation package, which the handler does not.
    if name == "LangChainInstrumentor":
        from agentlightning_langchain.instrumentor import LangChainInstrumentor

        return LangChainInstrumentor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
