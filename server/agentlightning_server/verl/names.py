"""Names by which VeRL's processes find our parts. Imports nothing of VeRL."""

from __future__ import annotations

from typing import Final

from agentlightning.bridge import LearningSettings
from agentlightning.learning.batching import Normalise

PREFIX: Final = "agentlightning"
LOSS: Final = PREFIX
ESTIMATOR_MODULE: Final = "agentlightning_server.verl.estimator"
CPU_MODULE: Final = "agentlightning_server.verl.cpu.platform"
CPU_WORKER: Final = "agentlightning_server.verl.cpu.vllm_worker.CpuWorkerExtension"
MANAGER: Final = "agentlightning_server.verl.manager.RolloutManager"
DATASET: Final = ("pkg://agentlightning_server.verl.dataset", "TaskDataset")
BRIDGE_ACTOR: Final = "agentlightning-bridge"
NAMESPACE: Final = "agentlightning"


def estimator_name(normalise: Normalise, *, whitens: bool = False) -> str:
    """`algorithm.adv_estimator` for our advantages, e.g. agentlightning_episode."""
    return f"{PREFIX}_{normalise}" + ("_whitened" if whitens else "")


def estimator_of(learning: LearningSettings) -> str:
    """The estimator that these settings ask for."""
    return estimator_name(learning.normalisation, whitens=learning.estimator.whitens)


def is_ours(estimator: str) -> bool:
    """Whether advantages are ours or VeRL's own."""
    return estimator.startswith(PREFIX)
