"""Agent Lightning: turn the traces of an existing agent into reinforcement learning, without rewriting it.

This package is the thin part: vocabulary, tracers, rewards, the reading of spans, credit, batches, client and
runner. Names are loaded when first used, so that `import agentlightning` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentlightning._version import __version__
    from agentlightning.bridge import LearningSettings, RolloutService, TrainerBridge
    from agentlightning.client import LightningClient
    from agentlightning.context import current_rollout, use_rollout
    from agentlightning.learning import AIR, Estimator, discounted, identical, select_agents
    from agentlightning.rewards import emit_reward
    from agentlightning.runner import RolloutContext, Worker
    from agentlightning.tracing import Tracer, capture_spans, configure, trace
    from agentlightning.tracing.light import LightTracer
    from agentlightning.tracing.otel import OTelTracer
    from agentlightning.types import Batch, Episode, Mode, Rollout, Span, Task, Transition

__all__ = [
    "AIR",
    "Batch",
    "Episode",
    "Estimator",
    "LearningSettings",
    "LightTracer",
    "LightningClient",
    "Mode",
    "OTelTracer",
    "Rollout",
    "RolloutContext",
    "RolloutService",
    "Span",
    "Task",
    "Tracer",
    "TrainerBridge",
    "Transition",
    "Worker",
    "__version__",
    "capture_spans",
    "configure",
    "current_rollout",
    "discounted",
    "emit_reward",
    "identical",
    "select_agents",
    "trace",
    "use_rollout",
]

_HOME = {
    "__version__": "_version",
    "LearningSettings": "bridge",
    "RolloutService": "bridge",
    "TrainerBridge": "bridge",
    "LightningClient": "client",
    "current_rollout": "context",
    "use_rollout": "context",
    "AIR": "learning",
    "Estimator": "learning",
    "discounted": "learning",
    "identical": "learning",
    "select_agents": "learning",
    "emit_reward": "rewards",
    "RolloutContext": "runner",
    "Worker": "runner",
    "LightTracer": "tracing.light",
    "OTelTracer": "tracing.otel",
    "Tracer": "tracing",
    "capture_spans": "tracing",
    "configure": "tracing",
    "trace": "tracing",
    "Batch": "types",
    "Episode": "types",
    "Mode": "types",
    "Rollout": "types",
    "Span": "types",
    "Task": "types",
    "Transition": "types",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'agentlightning' has no attribute '{name}'")
    value = getattr(import_module(f"agentlightning.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
