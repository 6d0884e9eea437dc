"""The commands of `agl`; those that train or export have modules of their own."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from agentlightning._version import __version__
from agentlightning.context import ENV_TRACER
from agentlightning.doctor import Finding, Level, Recorded, diagnose, gather
from agentlightning.runner.__main__ import main as run_worker
from agentlightning_server.cli import options
from agentlightning_server.cli.export import export
from agentlightning_server.cli.keys import keys
from agentlightning_server.cli.learning import air, rescore
from agentlightning_server.cli.option_groups import (
    LEARNING,
    OPERATING,
    UPDATE,
    Given,
    learning_of,
    operating_of,
    option_group,
)
from agentlightning_server.cli.options import policies_of, say, trained_of
from agentlightning_server.cli.progress import versions_of
from agentlightning_server.cli.sources import stored
from agentlightning_server.cli.storing import store
from agentlightning_server.cli.training import evaluate, train
from agentlightning_server.cli.verl import (
    ConfigOption,
    EngineKind,
    EngineOption,
    configuration,
    model_for,
    preflight_findings,
    refuse_for_verl,
    require_verl,
)
from agentlightning_server.engines.embedded.settings import DEFAULT_MODEL, EmbeddedSettings
from agentlightning_server.observing import configure_logs
from agentlightning_server.settings import Settings
from agentlightning_server.training.live import LiveSettings, LiveTrainer
from agentlightning_server.training.local import (
    Served,
    load_engine,
    local_server,
    newest_checkpoint,
)
from agentlightning_server.training.reporting import StepRecord
from agentlightning_server.verl.config import VerlFile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Agent Lightning: existing agents learn from their own traces.",
)
app.add_typer(export, name="export")
app.add_typer(keys, name="keys")
app.add_typer(store, name="store")
app.command()(train)
app.command(name="eval")(evaluate)
app.command()(air)
app.command()(rescore)


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
@option_group("update", UPDATE)
@option_group("learning", LEARNING)
@option_group("operating", OPERATING)
def serve(
    ctx: typer.Context,
    model: options.ModelOption = DEFAULT_MODEL,
    engine_kind: EngineOption = EngineKind.EMBEDDED,
    config: ConfigOption = None,
    host: options.HostOption = "127.0.0.1",
    port: options.PortOption = 8700,
    admin_key: options.AdminKeyOption = None,
    data: Annotated[Path, typer.Option(help="Folder of the database and the key.")] = Path("runs/serve"),
    policies: options.PoliciesOption = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of a run, or one of its checkpoints, to serve.")
    ] = None,
    upstreams: options.UpstreamsOption = None,
    learn: Annotated[bool, typer.Option(help="Learn from live rollouts as they get rewards.")] = False,
    train_policies: options.TrainPoliciesOption = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Rewarded rollouts per update.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-5,
    lora_rank: options.LoraRankOption = 0,
    *,
    learning: Given,
    update: Given,
    operating: Given,
) -> None:
    """Serve a policy to agents and store their traces, until interrupted; with --learn, improve it too."""
    served = policies_of(policies)
    live = LiveSettings(
        data,
        batch_size=batch_size,
        learning=learning_of(learning),
        policies=trained_of(served, train_policies),
    )
    settings = Settings(
        host=host,
        port=port,
        admin_key=admin_key,
        data=data,
        model=served[0],
        upstreams=upstreams,
        **operating_of(operating, data / "store.db"),
    ).with_admin_key()
    configure_logs(settings.log_format, settings.log_level)
    if engine_kind is EngineKind.VERL:
        refuse_for_verl(learn=learn, checkpoint=checkpoint is not None)
        file = configuration(config, {"lora_rank": lora_rank}, ctx, update)
        _serve_on_verl(file, settings, model_for(model, file, ctx), served[0])
        return
    engine = load_engine(
        EmbeddedSettings(
            model=model,
            policies=served,
            learning_rate=learning_rate,
            lora_rank=lora_rank,
            seed=secrets.randbits(31),  # a restart must not say the same things again
            **update,
        )
    )
    if checkpoint is not None:
        engine.load(newest_checkpoint(checkpoint))
    ended = _end_at_signal()
    with local_server(engine, settings) as server:
        _announce(server)
        if not learn:
            _wait_for(ended)
            return
        trainer = LiveTrainer(engine, server.store, live, _show_update)
        learner = threading.Thread(target=trainer.run, name="agentlightning-live")
        learner.start()
        _wait_for(ended)
        trainer.stop()
        learner.join()


def _serve_on_verl(file: VerlFile, settings: Settings, model: str, policy: str) -> None:
    require_verl()
    from agentlightning_server.verl.serve import serving_on_verl

    ended = _end_at_signal()
    with serving_on_verl(file, settings, model=model, policy=policy) as server:
        _announce(server)
        _wait_for(ended)


@app.command()
def run(
    agent: options.AgentArgument,
    server: Annotated[str, typer.Option(envvar="AGENTLIGHTNING_URL", help="URL of the server.")],
    key: Annotated[str, typer.Option(envvar="AGENTLIGHTNING_KEY", help="Runner or admin key.")],
    concurrency: options.ConcurrencyOption = 16,
    tracer: options.TracerOption = "otel",
) -> None:
    """Lease rollouts from a server and run the agent on them, until interrupted."""
    os.environ[ENV_TRACER] = tracer
    sys.path.insert(0, str(Path.cwd()))  # a console script does not look there for the agent's module
    arguments = [agent, "--server", server, "--key", key, "--concurrency", str(concurrency)]
    raise typer.Exit(run_worker(arguments))


@app.command()
@option_group("learning", LEARNING)
def doctor(
    ctx: typer.Context,
    run_folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of a run.")] = None,
    server: Annotated[str | None, typer.Option(help="URL of a live server instead.")] = None,
    key: Annotated[str | None, typer.Option(envvar="AGENTLIGHTNING_KEY")] = None,
    engine_kind: EngineOption = EngineKind.EMBEDDED,
    config: ConfigOption = None,
    model: options.ModelOption = DEFAULT_MODEL,
    output: Annotated[Path, typer.Option(help="Folder that the run on VeRL would have.")] = Path(
        "runs/train"
    ),
    port: options.PortOption = 0,
    as_json: options.JsonOption = False,
    *,
    learning: Given,
) -> None:
    """Check stored rollouts from span to batch, and say what stands in the way of learning.

    With --engine verl: check versions, file, GPUs, model, port and disk of a run on VeRL instead.
    """
    if engine_kind is EngineKind.VERL:
        findings = preflight_findings(config, model, output, port, ctx)
    else:
        findings = diagnose(_recorded(run_folder, server, key), learning_of(learning))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            _show(finding)
    raise typer.Exit(1 if any(f.level is Level.ERROR for f in findings) else 0)


def _recorded(run_folder: Path | None, server: str | None, key: str | None) -> list[Recorded]:
    with stored(run_folder, server, key) as source:
        return gather(list(source.rollouts()), source.service)


def _announce(server: Served) -> None:
    say(f"serving {server.gateway.base_model} at {server.url}/v1")
    say(f"  export AGENTLIGHTNING_URL={server.url} AGENTLIGHTNING_KEY={server.key}")
    say(f"  export OPENAI_BASE_URL={server.url}/v1 OPENAI_API_KEY={server.key}")


def _show_update(record: StepRecord) -> None:
    say(
        f"version {versions_of(record)}: {'learned from' if record.mixed_groups else 'unchanged by'} "
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
