"""Serving without training: vLLM replicas as VeRL starts them, behind the gateway, until the block ends."""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentlightning_server.settings import Settings
from agentlightning_server.training.local import Served, served
from agentlightning_server.training.trainer import TrainSettings
from agentlightning_server.verl.config import VerlFile, compose, environment
from agentlightning_server.verl.launch import shut_down, start_ray
from agentlightning_server.verl.run import gateway_engine


@contextmanager
def serving_on_verl(file: VerlFile, settings: Settings, *, model: str, policy: str) -> Generator[Served]:
    """A server whose policy vLLM samples: as many replicas as the file's GPUs hold."""
    nowhere = Path(os.devnull)
    variables = environment(file, nowhere)
    os.environ.update(variables)
    training = TrainSettings(run_id="serve", output=settings.data_dir)
    config = compose(file, training, model=model, train_tasks=nowhere, val_tasks=nowhere, validates=False)
    engine = gateway_engine(config, model, policy)
    with served(engine, settings) as up:
        start_ray(config, variables)
        try:
            engine.attach(_replicas(config))
            yield up
        finally:
            engine.attach(None)
            shut_down()


def _replicas(config: Any) -> Any:
    """VeRL's client of replicas that nothing trains, which load the model's own weights."""
    from verl.workers.rollout.llm_server import LLMServerManager

    rollout = config.actor_rollout_ref.rollout
    rollout.load_format = "auto"
    rollout.nnodes = config.trainer.nnodes
    rollout.n_gpus_per_node = config.trainer.n_gpus_per_node
    return LLMServerManager.create(config=config).get_client()
