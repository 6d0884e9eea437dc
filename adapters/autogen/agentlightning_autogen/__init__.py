"""Records AutoGen agents for Agent Lightning: one line, `agentlightning_autogen.instrument()`.

What this is not: part of the agent. It records model calls, tool calls and agent runs of `autogen-agentchat`
with OpenAI-compatible clients, and tells our server which rollout a request belongs to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import autogen_agentchat  # pyright: ignore[reportUnusedImport]  # noqa: F401
    import autogen_ext.models.openai  # pyright: ignore[reportUnusedImport]  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"The AutoGen adapter needs AutoGen ({error}). Install it in the clone: pip install '.[autogen]'"
    ) from error

from agentlightning_autogen.instrumentation import instrument, uninstrument

if TYPE_CHECKING:
    from agentlightning_autogen.instrumentor import AutoGenInstrumentor

__all__ = ["AutoGenInstrumentor", "instrument", "uninstrument"]


def __getattr__(name: str) -> Any:
    # Lazily: it needs OpenTelemetry's instrumentation package, which `instrument` does not.
    if name == "AutoGenInstrumentor":
        from agentlightning_autogen.instrumentor import AutoGenInstrumentor

        return AutoGenInstrumentor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
