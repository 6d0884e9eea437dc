"""The commands of `agl`."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from agentlightning._version import __version__
from agentlightning.bridge import LearningSettings
from agentlightning.context import ENV_TRACER
from agentlightning.doctor import Finding, Level, Recorded, diagnose, gather
from agentlightning.errors import InvalidInput
from agentlightning.learning import AIR, CREDIT, Estimator, select_agents
from agentlightning.runner.__main__ import main as run_worker
from agentlightning.tasks import load_tasks
from agentlightning.types import Limits, Task
from agentlightning_server.cli.export import export
from agentlightning_server.cli.progress import ProgressReporter
from agentlightning_server.cli.sources import stored
from agentlightning_server.engines.embedded.settings import DEFAULT_MODEL, EmbeddedSettings
from agentlightning_server.settings import Settings
from agentlightning_server.store import Principal, Scope
from agentlightning_server.training.live import LiveSettings, LiveTrainer
from agentlightning_server.training.local import (
    LocalServer,
    RunnerSettings,
    load_engine,
    local_server,
    newest_checkpoint,
    train_locally,
)
from agentlightning_server.training.reporting import StepRecord
from agentlightning_server.training.trainer import TrainResult, TrainSettings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Agent Lightning: existing agents learn from their own traces.",
)
app.add_typer(export, name="export")
console = Console(stderr=True)

AgentArgument = Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="Function that runs one task.")]
TasksOption = Annotated[Path, typer.Option("--tasks", help="JSONL file, one task a line.")]
ModelOption = Annotated[str, typer.Option(help="Hugging Face folder or hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]
ConcurrencyOption = Annotated[int, typer.Option(min=1, help="Attempts at the same time.")]
TracerOption = Annotated[str, typer.Option(help="otel or light.")]
HostOption = Annotated[str, typer.Option(help="Address to listen on; beyond loopback needs --admin-key.")]
PortOption = Annotated[int, typer.Option(help="Port to listen on; 0 takes any.")]
AdminKeyOption = Annotated[
    str | None,
    typer.Option(envvar="AGENTLIGHTNING_ADMIN_KEY", help="Key of the server; made when not given."),
]


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Options of all commands."""


@app.command()
def serve(
    model: ModelOption = DEFAULT_MODEL,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8700,
    admin_key: AdminKeyOption = None,
    data: Annotated[Path, typer.Option(help="Folder of the database and the key.")] = Path("runs/serve"),
    policy: Annotated[str, typer.Option(help="Name the model is served under.")] = "policy",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a run, or one of its checkpoints, to serve.")
    ] = None,
    learn: Annotated[bool, typer.Option(help="Learn from live rollouts as they get rewards.")] = False,
    batch_size: Annotated[int, typer.Option(min=2, help="Rewarded rollouts per update.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-5,
    lora_rank: Annotated[int, typer.Option(min=0, help="0 trains the full weights.")] = 0,
    agents: Annotated[
        list[str] | None, typer.Option("--agent", help="Learn only from these agents (name or path, glob).")
    ] = None,
) -> None:
    """Serve a policy to agents and store their traces, until interrupted; with --learn, improve it too."""
    settings = Settings(
        host=host, port=port, admin_key=admin_key, database=data / "store.db", model=policy
    ).with_admin_key()
    engine = load_engine(
        EmbeddedSettings(model=model, policies=(policy,), learning_rate=learning_rate, lora_rank=lora_rank)
    )
    if checkpoint is not None:
        engine.load(newest_checkpoint(checkpoint))
    ended = _end_at_signal()
    with local_server(engine, settings) as server:
        _announce(server)
        if not learn:
            _wait_for(ended)
            return
        learning = LearningSettings(
            policy=policy, air=AIR(), select=select_agents(*agents) if agents else None
        )
        live = LiveSettings(data, batch_size=batch_size, learning=learning)
        trainer = LiveTrainer(engine, server.store, live, _show_update)
        learner = threading.Thread(target=trainer.run, name="agentlightning-live")
        learner.start()
        _wait_for(ended)
        trainer.stop()
        learner.join()


@app.command()
def train(
    agent: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:FUNCTION]", help="Function that runs one task; none: runners elsewhere."
        ),
    ] = None,
    tasks: TasksOption = ...,  # type: ignore[assignment]  # pyright: ignore[reportArgumentType]
    val: Annotated[Path | None, typer.Option(help="JSONL file of held-out tasks.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    output: Annotated[Path, typer.Option(help="Folder of the run; an existing run is resumed.")] = Path(
        "runs/train"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Policy updates.")] = 10,
    tasks_per_step: Annotated[int, typer.Option(min=1)] = 8,
    group_size: Annotated[int, typer.Option(min=2, help="Rollouts per task, compared with each other.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-5,
    lora_rank: Annotated[int, typer.Option(min=0, help="0 trains the full weights.")] = 0,
    estimator: Annotated[Estimator, typer.Option(help="Group baseline.")] = Estimator.GRPO,
    credit: Annotated[str, typer.Option(help=f"Credit assignment: {', '.join(CREDIT)}.")] = "identical",
    air: Annotated[bool, typer.Option(help="Automatic intermediate rewards from tool outcomes.")] = True,
    agents: Annotated[
        list[str] | None, typer.Option("--agent", help="Train only these agents (name or node path, glob).")
    ] = None,
    seed: int = 0,
    eval_every: Annotated[int, typer.Option(min=0)] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1)] = 5,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds one attempt may take.")] = 600.0,
    concurrency: ConcurrencyOption = 16,
    tracer: TracerOption = "otel",
    host: HostOption = "127.0.0.1",
    port: PortOption = 0,
    admin_key: AdminKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the policy behind an agent with reinforcement learning."""
    if credit not in CREDIT:
        raise InvalidInput(f"unknown credit assignment '{credit}'; choose from {', '.join(CREDIT)}")
    learning = LearningSettings(
        air=AIR() if air else None,
        select=select_agents(*agents) if agents else None,
        credit=CREDIT[credit],
        estimator=estimator,
    )
    training = TrainSettings(
        run_id=run_id_of(output),
        output=output,
        steps=steps,
        tasks_per_step=tasks_per_step,
        group_size=group_size,
        seed=seed,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        learning=learning,
        limits=Limits(start_to_close_s=timeout),
    )
    engine = EmbeddedSettings(model=model, learning_rate=learning_rate, lora_rank=lora_rank, seed=seed)
    server = Settings(host=host, port=port, admin_key=admin_key)
    runner = RunnerSettings(agent, concurrency, tracer) if agent else None
    _run(runner, training, engine, server, load_tasks(tasks), _held_out(val), as_json)


def run_id_of(output: Path) -> str:
    """The folder's name, as far as it can stand at the head of rollout ids."""
    return re.sub(r"[^A-Za-z0-9._~-]", "-", output.resolve().name).lstrip("._~-")[:80] or "run"


@app.command(name="eval")
def evaluate(
    agent: AgentArgument,
    tasks: TasksOption,
    model: ModelOption = DEFAULT_MODEL,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a run, or one of its checkpoints.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for evaluations.")] = Path("runs/eval"),
    timeout: Annotated[float, typer.Option(min=1, help="Seconds one attempt may take.")] = 600.0,
    concurrency: ConcurrencyOption = 16,
    tracer: TracerOption = "otel",
    as_json: JsonOption = False,
) -> None:
    """Run an agent on held-out tasks and print its mean reward with a 95 % interval."""
    folder = output / time.strftime("%Y%m%d-%H%M%S")  # an evaluation never reuses another one's rollouts
    training = TrainSettings(
        run_id=f"eval-{folder.name}", output=folder, steps=0, limits=Limits(start_to_close_s=timeout)
    )
    runner = RunnerSettings(agent, concurrency, tracer)
    held_out = load_tasks(tasks, split="val")
    _run(runner, training, EmbeddedSettings(model=model), Settings(port=0), [], held_out, as_json, checkpoint)


@app.command()
def run(
    agent: AgentArgument,
    server: Annotated[str, typer.Option(envvar="AGENTLIGHTNING_URL", help="URL of the server.")],
    key: Annotated[str, typer.Option(envvar="AGENTLIGHTNING_KEY", help="Runner or admin key.")],
    concurrency: ConcurrencyOption = 16,
    tracer: TracerOption = "otel",
) -> None:
    """Lease rollouts from a server and run the agent on them, until interrupted."""
    os.environ[ENV_TRACER] = tracer
    sys.path.insert(0, str(Path.cwd()))  # a console script does not look there for the agent's module
    arguments = [agent, "--server", server, "--key", key, "--concurrency", str(concurrency)]
    raise typer.Exit(run_worker(arguments))


@app.command()
def doctor(
    run_folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of a run.")] = None,
    server: Annotated[str | None, typer.Option(help="URL of a live server instead.")] = None,
    key: Annotated[str | None, typer.Option(envvar="AGENTLIGHTNING_KEY")] = None,
    agents: Annotated[list[str] | None, typer.Option("--agent", help="Agents meant to train.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check stored rollouts from span to batch, and say what stands in the way of learning."""
    learning = LearningSettings(air=AIR(), select=select_agents(*agents) if agents else None)
    findings = diagnose(_recorded(run_folder, server, key), learning)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            _show(finding)
    raise typer.Exit(1 if any(f.level is Level.ERROR for f in findings) else 0)


def _recorded(run_folder: Path | None, server: str | None, key: str | None) -> list[Recorded]:
    with stored(run_folder, server, key) as source:
        return gather(list(source.rollouts()), source.service)


def _held_out(path: Path | None) -> list[Task]:
    return load_tasks(path, split="val") if path is not None else []


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
    with ProgressReporter(training.steps, console) as reporter:
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
        _say(f"checkpoint: {result.checkpoint}; serve it: agl serve --checkpoint {result.checkpoint}")
    if as_json:
        typer.echo(json.dumps(_summary(result)))


def _summary(result: TrainResult) -> dict[str, Any]:
    evaluations = {"before": result.before, "after": result.after}
    return {
        "steps": len(result.steps),
        "rewards": [round(record.reward, 4) for record in result.steps],
        **{
            name: None
            if record is None
            else {
                "reward": round(record.reward, 4),
                "stderr": round(record.stderr, 4),
                "return": round(record.mean_return, 4),
                "tool_calls": round(record.tool_calls, 4),
                "held_out": record.held_out,
            }
            for name, record in evaluations.items()
        },
        "checkpoint": str(result.checkpoint) if result.checkpoint else None,
    }


def _say(line: str) -> None:
    """A line that can be copied: not coloured, not wrapped."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _announce(server: LocalServer) -> None:
    _say(f"serving {server.engine.base_model} at {server.url}/v1")
    _say(f"  export AGENTLIGHTNING_URL={server.url} AGENTLIGHTNING_KEY={server.key}")
    _say(f"  export OPENAI_BASE_URL={server.url}/v1 OPENAI_API_KEY={server.key}")


def _call_for_runners(server: LocalServer) -> None:
    """How to start a runner elsewhere, with a key that is good for nothing else."""
    key = server.store.mint_key(Principal(Scope.RUNNER))
    _say(f"serving {server.engine.base_model} at {server.url}; start runners with")
    _say(f"  agl run MODULE:FUNCTION --server {server.url} --key {key}")


def _show_update(record: StepRecord) -> None:
    _say(
        f"version {record.version}: {'learned from' if record.mixed_groups else 'unchanged by'} "
        f"{record.episodes} live rollouts, mean reward {record.reward:.3f}, return {record.mean_return:.3f}"
        + ("" if record.mixed_groups else "; they all earned the same")
    )


def _end_at_signal() -> threading.Event:
    """Set by the first SIGINT or SIGTERM; the second ends the process at once."""
    ended = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def end(_number: int, _frame: object) -> None:
        ended.set()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, end)
    return ended


def _wait_for(ended: threading.Event) -> None:
    """Looks up every second: a signal that the kernel hands to another thread does not wake this one."""
    while not ended.wait(1.0):
        pass


def _show(finding: Finding) -> None:
    colour = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "red"}[finding.level]
    out = Console()
    out.print(f"[{colour}]{finding.level:>7}[/]  ", end="")
    out.print(finding.what, highlight=False, markup=False, soft_wrap=True)
    if finding.remedy:
        out.print(f"         -> {finding.remedy}", highlight=False, markup=False, soft_wrap=True)
