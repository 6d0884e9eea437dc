"""Training on the embedded engine: the loop, its settings, and everything on one machine."""

from agentlightning_server.engines.embedded.settings import EmbeddedSettings
from agentlightning_server.training.local import RunnerSettings, local_server, train_locally
from agentlightning_server.training.reporting import EvalRecord, Reporter, StepRecord
from agentlightning_server.training.trainer import Trainer, TrainResult, TrainSettings

__all__ = [
    "EmbeddedSettings",
    "EvalRecord",
    "Reporter",
    "RunnerSettings",
    "StepRecord",
    "TrainResult",
    "TrainSettings",
    "Trainer",
    "local_server",
    "train_locally",
]
