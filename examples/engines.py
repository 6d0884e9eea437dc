"""One option that moves an example from the embedded engine to VeRL: `--engine verl --config FILE`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agentlightning.types import Task
from agentlightning_server.training import (
    EmbeddedSettings,
    Reporter,
    RunnerSettings,
    TrainResult,
    TrainSettings,
    train_locally,
)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--engine and --config."""
    parser.add_argument("--engine", choices=("embedded", "verl"), default="embedded")
    parser.add_argument("--config", type=Path, help="VeRL's settings, for --engine verl: examples/*/verl")


def train_with(
    args: argparse.Namespace,
    runner: RunnerSettings,
    training: TrainSettings,
    embedded: EmbeddedSettings,
    *,
    train: Sequence[Task],
    held_out: Sequence[Task],
    reporter: Reporter,
    checkpoint: Path | None = None,
) -> TrainResult:
    """Train on the engine that was asked for. On VeRL the file names the model, devices and learning rate.

    `checkpoint` is one of the embedded engine to start from.
    """
    if args.engine == "embedded":
        return train_locally(
            runner,
            training,
            embedded,
            train=train,
            held_out=held_out,
            reporter=reporter,
            checkpoint=checkpoint,
        )
    if args.config is None:
        raise SystemExit("--engine verl needs --config FILE: see the verl folder beside the example")
    from agentlightning_server.verl.config import read_file
    from agentlightning_server.verl.run import train_on_verl

    file = read_file(args.config)
    model = file.get("actor_rollout_ref.model.path") or embedded.model
    return train_on_verl(
        runner, training, file, model=model, train=train, held_out=held_out, reporter=reporter
    )
