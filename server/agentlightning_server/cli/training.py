"""`agl train` and `agl eval`: a run on this machine, with its progress, and its result as JSON."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from agentlightning.errors import InvalidInput
from agentlightning.learning import Estimator
from agentlightning.named_learning import NamedLearning
from agentlightning.tasks import load_tasks
from agentlightning.types import Limits, Task
from agentlightning_server.cli import options
from agentlightning_server.cli.option_groups import LEARNING, UPDATE, Given, learning_of, option_group
from agentlightning_server.cli.options import policies_of, say, trained_of
from agentlightning_server.cli.progress import ProgressReporter
from agentlightning_server.cli.verl import (
    ConfigOption,
    EngineKind,
    EngineOption,
    configuration,
    model_for,
    refuse_for_verl,
    require_verl,
    settings_for,
)
from agentlightning_server.engines.embedded.settings import DEFAULT_MODEL, EmbeddedSettings
from agentlightning_server.settings import Settings
from agentlightning_server.store import Scope
from agentlightning_server.training.local import RunnerSettings, Served, train_locally
from agentlightning_server.training.trainer import TrainResult, TrainSettings
from agentlightning_server.verl.config import VerlFile


@option_group("update", UPDATE)
@option_group("learning", LEARNING)
def train(
    ctx: typer.Context,
    agent: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:FUNCTION]", help="Function that runs one task; none: runners elsewhere."
        ),
    ] = None,
    tasks: options.TasksOption = ...,  # type: ignore[assignment]  # pyright: ignore[reportArgumentType]
    val: Annotated[Path | None, typer.Option(help="JSONL file of held-out tasks.")] = None,
    model: options.ModelOption = DEFAULT_MODEL,
    engine_kind: EngineOption = EngineKind.EMBEDDED,
    config: ConfigOption = None,
    output: Annotated[Path, typer.Option(help="Folder of the run; an existing run is resumed.")] = Path(
        "runs/train"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Policy updates.")] = 10,
    tasks_per_step: Annotated[int, typer.Option(min=1)] = 8,
    group_size: Annotated[
        int, typer.Option(min=1, help="Rollouts per task, compared with each other; 1 needs --critic.")
    ] = 8,
    dynamic_rounds: Annotated[
        int,
        typer.Option(min=1, help="Rounds of further tasks until enough groups differ (DAPO); 1 for none."),
    ] = 1,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-5,
    lora_rank: options.LoraRankOption = 0,
    policies: options.PoliciesOption = None,
    train_policies: options.TrainPoliciesOption = None,
    upstreams: options.UpstreamsOption = None,
    seed: int = 0,
    eval_every: Annotated[int, typer.Option(min=0)] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1)] = 5,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds one attempt may take.")] = 600.0,
    concurrency: options.ConcurrencyOption = 16,
    tracer: options.TracerOption = "otel",
    host: options.HostOption = "127.0.0.1",
    port: options.PortOption = 0,
    admin_key: options.AdminKeyOption = None,
    as_json: options.JsonOption = False,
    *,
    learning: Given,
    update: Given,
) -> None:
    """Train the policy behind an agent with reinforcement learning, or one for each agent of a flow."""
    served = policies_of(policies)
    training = TrainSettings(
        run_id=run_id_of(output),
        output=output,
        steps=steps,
        tasks_per_step=tasks_per_step,
        group_size=group_size,
        seed=seed,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        learning=learning_of(learning),
        learning_names=NamedLearning().changed(learning).to_json(),
        max_rounds=dynamic_rounds,
        policies=trained_of(served, train_policies),
        limits=Limits(start_to_close_s=timeout),
    )
    server = Settings(host=host, port=port, admin_key=admin_key, upstreams=upstreams)
    runner = RunnerSettings(agent, concurrency, tracer) if agent else None
    held_out = load_tasks(val, split="val") if val is not None else []
    if engine_kind is EngineKind.VERL:
        refuse_for_verl(dynamic_rounds=dynamic_rounds > 1)
        given = {"learning_rate": learning_rate, "lora_rank": lora_rank}
        file = configuration(config, given, ctx, update)
        training = settings_for(training, file, ctx)
        _run_on_verl(
            runner, training, file, server, load_tasks(tasks), held_out, as_json, model_for(model, file, ctx)
        )
        return
    engine = EmbeddedSettings(
        model=model, policies=served, learning_rate=learning_rate, lora_rank=lora_rank, seed=seed, **update
    )
    _check_comparable(group_size, engine, learning)
    _run(runner, training, engine, server, load_tasks(tasks), held_out, as_json)


def _check_comparable(group_size: int, engine: EmbeddedSettings, learning: Given) -> None:
    """One rollout per task has nothing to be compared with, but by a critic or with the whole batch."""
    whole_batch = learning.get("estimator") is Estimator.REINFORCE_PP
    if group_size < 2 and not engine.critic and not whole_batch:
        raise InvalidInput("--group-size 1 leaves nothing to compare: add --critic, or take 2 or more")


def evaluate(
    agent: options.AgentArgument,
    tasks: options.TasksOption,
    model: options.ModelOption = DEFAULT_MODEL,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a run, or one of its checkpoints.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(min=0, help="The checkpoint's; 0 for full weights.")] = 0,
    policies: options.PoliciesOption = None,
    upstreams: options.UpstreamsOption = None,
    output: Annotated[Path, typer.Option(help="Folder for evaluations.")] = Path("runs/eval"),
    timeout: Annotated[float, typer.Option(min=1, help="Seconds one attempt may take.")] = 600.0,
    concurrency: options.ConcurrencyOption = 16,
    tracer: options.TracerOption = "otel",
    as_json: options.JsonOption = False,
) -> None:
    """Run an agent on held-out tasks and print its mean reward with a 95 % interval."""
    folder = output / time.strftime("%Y%m%d-%H%M%S")  # an evaluation never reuses another one's rollouts
    served = policies_of(policies)
    training = TrainSettings(
        run_id=f"eval-{folder.name}",
        output=folder,
        steps=0,
        policies=served,
        limits=Limits(start_to_close_s=timeout),
    )
    engine = EmbeddedSettings(model=model, policies=served, lora_rank=lora_rank)
    runner = RunnerSettings(agent, concurrency, tracer)
    held_out = load_tasks(tasks, split="val")
    _run(runner, training, engine, Settings(port=0, upstreams=upstreams), [], held_out, as_json, checkpoint)


def run_id_of(output: Path) -> str:
    """The folder's name, as far as it can stand at the head of rollout ids."""
    return re.sub(r"[^A-Za-z0-9._~-]", "-", output.resolve().name).lstrip("._~-")[:80] or "run"


def _run(
    runner: RunnerSettings | None,
    training: TrainSettings,
    engine: EmbeddedSettings,
    server: Settings,
    tasks: list[Task],
    held_out: list[Task],
    as_json: bool,
    checkpoint: Path | None = None,
) -> None:
    with ProgressReporter(training.steps, options.console) as reporter:
        result = train_locally(
            runner,
            training,
            engine,
            train=tasks,
            held_out=held_out,
            reporter=reporter,
            server=server,
            announce=None if runner else _call_for_runners,
            checkpoint=checkpoint,
        )
    if result.checkpoint is not None:
        say(f"checkpoint: {result.checkpoint}; serve it: {_serving(result.checkpoint, engine)}")
    if as_json:
        typer.echo(json.dumps(_summary(result)))


def _run_on_verl(
    runner: RunnerSettings | None,
    training: TrainSettings,
    file: VerlFile,
    server: Settings,
    tasks: list[Task],
    held_out: list[Task],
    as_json: bool,
    model: str,
) -> None:
    require_verl()
    from agentlightning_server.verl.run import train_on_verl

    with ProgressReporter(training.steps, options.console) as reporter:
        result = train_on_verl(
            runner,
            training,
            file,
            model=model,
            train=tasks,
            held_out=held_out,
            reporter=reporter,
            server=server,
            announce=None if runner else _call_for_runners,
        )
    if result.checkpoint is not None:
        folder = result.checkpoint / "actor" / "huggingface"
        say(f"checkpoint: {result.checkpoint}; serve it: agl serve --model {folder}")
    if as_json:
        typer.echo(json.dumps(_summary(result)))


def _serving(checkpoint: Path, engine: EmbeddedSettings) -> str:
    """The command that serves a run's checkpoint."""
    model = f" --model {engine.model}" if engine.model != DEFAULT_MODEL else ""
    named = engine.policies != policies_of(None)
    policies = "".join(f" --policy {name}" for name in engine.policies) if named else ""
    rank = f" --lora-rank {engine.lora_rank}" if engine.lora_rank else ""
    return f"agl serve --checkpoint {checkpoint}{model}{policies}{rank}"


def _call_for_runners(server: Served) -> None:
    """How to start a runner elsewhere, with a key that is good for nothing else."""
    key = server.store.mint_key(Scope.RUNNER)
    say(f"serving {server.gateway.base_model} at {server.url}; start runners with")
    say(f"  agl run MODULE:FUNCTION --server {server.url} --key {key}")


def _summary(result: TrainResult) -> dict[str, Any]:
    evaluations = {"before": result.before, "after": result.after}
    records = [result.before, *result.steps, result.after]
    versions = [record.versions for record in records if record is not None]
    return {
        "steps": len(result.steps),
        "rewards": [round(record.reward, 4) for record in result.steps],
        "versions": dict(versions[-1]) if versions else {},
        **{
            name: None
            if record is None
            else {
                "reward": round(record.reward, 4),
                "stderr": round(record.stderr, 4),
                "return": round(record.mean_return, 4),
                "tool_calls": round(record.tool_calls, 4),
                "held_out": record.held_out,
                "versions": dict(record.versions),
            }
            for name, record in evaluations.items()
        },
        "checkpoint": str(result.checkpoint) if result.checkpoint else None,
    }
