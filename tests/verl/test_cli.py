"""`--engine verl` on the command line, as far as it goes without VeRL: what wins, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from agentlightning.errors import InvalidInput
from agentlightning_server.cli.commands import app
from agentlightning_server.cli.verl import configuration, model_for, settings_for
from agentlightning_server.training.trainer import TrainSettings

FILE = """
data: {train_batch_size: 32, seed: 5}
actor_rollout_ref:
  rollout: {n: 4}
  model: {path: meta-llama/Llama-3.2-3B-Instruct}
  actor: {optim: {lr: 1.0e-6, weight_decay: 0.01}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "verl.yaml"
    path.write_text(FILE)
    return path


def chosen(file: Path, *arguments: str) -> dict[str, Any]:
    """What comes of options and file together."""
    probe = typer.Typer()

    @probe.command()
    def command(
        ctx: typer.Context,
        steps: int = 10,
        tasks_per_step: int = 8,
        group_size: int = 8,
        seed: int = 0,
        eval_every: int = 0,
        checkpoint_every: int = 5,
        model: str = "default",
        learning_rate: Annotated[float, typer.Option()] = 1e-5,
    ) -> None:
        read = configuration(file, {"learning_rate": learning_rate}, ctx, {})
        given = TrainSettings(
            "r", Path(), steps, tasks_per_step, group_size, seed, eval_every, checkpoint_every
        )
        settings = settings_for(given, read, ctx)
        found = {"optim": read.get("actor_rollout_ref.actor.optim"), "model": model_for(model, read, ctx)}
        found |= {name: getattr(settings, name) for name in ("steps", "tasks_per_step", "group_size", "seed")}
        typer.echo(json.dumps(found))

    result = CliRunner().invoke(probe, list(arguments), catch_exceptions=False)
    return json.loads(result.stdout)


def test_the_file_wins_over_an_options_default(file: Path) -> None:
    found = chosen(file)
    assert (found["tasks_per_step"], found["group_size"], found["seed"], found["steps"]) == (32, 4, 5, 10)
    assert found["model"] == "meta-llama/Llama-3.2-3B-Instruct"
    assert found["optim"] == {"lr": 1e-6, "weight_decay": 0.01}


def test_an_option_that_is_given_wins_over_the_file(file: Path) -> None:
    options = ("--tasks-per-step", "2", "--seed", "0", "--model", "mine", "--learning-rate", "0.001")
    found = chosen(file, *options)
    assert (found["tasks_per_step"], found["group_size"], found["seed"]) == (2, 4, 0)
    assert found["model"] == "mine"
    assert found["optim"] == {"lr": 0.001, "weight_decay": 0.01}


def refused(tmp_path: Path, *arguments: str) -> str:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": "a", "input": 1}\n')
    with pytest.raises(InvalidInput) as caught:
        CliRunner().invoke(
            app,
            ["train", "m:f", "--tasks", str(tasks), "--engine", "verl", *arguments],
            catch_exceptions=False,
        )
    return str(caught.value)


def test_a_file_is_needed(tmp_path: Path) -> None:
    assert "--config FILE" in refused(tmp_path)


def test_options_of_the_embedded_engine_are_refused_with_verls_names(tmp_path: Path, file: Path) -> None:
    assert "use_kl_loss" in refused(tmp_path, "--config", str(file), "--kl", "0.1")
    assert "--dynamic-rounds" in refused(tmp_path, "--config", str(file), "--dynamic-rounds", "2")
    two = ("--policy", "a", "--policy", "b", "--lora-rank", "8")
    assert "one policy" in refused(tmp_path, "--config", str(file), *two)
