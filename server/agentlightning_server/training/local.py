"""Everything on one machine: engine, store, gateway and server in this process, the runner in another.

The same parts serve `agl serve` (no runner), `agl train` and `agl eval`; with `workers` set to 0 the runners
are elsewhere and connect over HTTP.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from agentlightning.context import ENV_KEY, ENV_TRACER
from agentlightning.errors import AgentLightningError, Unavailable
from agentlightning.types import Span, Task
from agentlightning_server.app import create_app, serve_in_thread
from agentlightning_server.engines.base import Engine, ServingEngine
from agentlightning_server.engines.embedded.settings import EmbeddedSettings
from agentlightning_server.gateway import (
    Gateway,
    GatewaySettings,
    Upstreams,
    gateway_routes,
    load_upstreams,
)
from agentlightning_server.settings import Settings
from agentlightning_server.store import Scope, Store
from agentlightning_server.training.reporting import Reporter
from agentlightning_server.training.trainer import Trainer, TrainResult, TrainSettings

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUNNER_GRACE_S = 2.0  # for attempts to finish; all that matter have finished when the runner is stopped
RUNNER_STOP_S = 15.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """The runner that is started beside the server."""

    agent: str
    """MODULE:FUNCTION of the function that runs one task."""
    concurrency: int = 16
    """Attempts at the same time, each in its own process."""
    tracer: str = "otel"
    """"otel" or "light"."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is up, with what it is made of."""

    url: str
    key: str = field(repr=False)
    """Admin key."""
    store: Store
    gateway: Gateway


@dataclass(frozen=True, slots=True)
class LocalServer(Served):
    """A server whose engine learns too."""

    engine: Engine


@contextmanager
def local_server(
    engine: Engine, settings: Settings, gateway: GatewaySettings | None = None
) -> Generator[LocalServer]:
    """Serve an engine until the block ends; the engine is closed with it."""
    with served(engine, settings, gateway) as up:
        yield LocalServer(up.url, up.key, up.store, up.gateway, engine)


@contextmanager
def served(
    engine: ServingEngine, settings: Settings, gateway: GatewaySettings | None = None
) -> Generator[Served]:
    """As `local_server`, for an engine that something else trains."""
    settings = settings.with_admin_key()
    upstreams = Upstreams(load_upstreams(settings.upstreams) if settings.upstreams else None)
    with (
        only_server_of(settings.data_dir),
        Store(settings.database, durability=settings.durability) as store,
    ):

        async def record(project: str, spans: Sequence[Span]) -> None:
            await asyncio.wrap_future(store.of(project).submit_spans(spans))

        service = Gateway(engine, record, gateway, upstreams)
        app = create_app(store, gateway=gateway_routes(service), settings=settings, on_stop=upstreams.close)
        server = serve_in_thread(app, settings.host, settings.port)
        try:
            yield Served(server.url, settings.admin_key or "", store, service)
        finally:
            engine.close()
            server.stop()


@contextmanager
def only_server_of(folder: Path) -> Generator[None]:
    """Hold the folder while the block runs. Raises Unavailable when another process does.

    Two that train in one folder would take each other's rollouts and overwrite each other's checkpoints.
    """
    if fcntl is None:  # no such locks here
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "server.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Unavailable(
                f"another process trains or serves in {folder}: wait for its end, or choose another folder"
            ) from error
        yield


@contextmanager
def local_runner(url: str, key: str, runner: RunnerSettings, log: Path) -> Generator[Callable[[], None]]:
    """Run the agent in a process of its own; yields a check that raises when that process has died."""
    command = [sys.executable, "-m", "agentlightning.runner", runner.agent, "--server", url]
    command += ["--concurrency", str(runner.concurrency), "--grace", str(RUNNER_GRACE_S), "--with-parent"]
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, ENV_KEY: key, ENV_TRACER: runner.tracer, "PYTHONPATH": path}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,  # closes with this process, however it ends
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def check() -> None:
        if process.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise AgentLightningError(
                f"the runner of {runner.agent} ended with exit code {process.returncode}; "
                f"the end of its log {log}:\n{tail}"
            )

    try:
        yield check
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(RUNNER_STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def load_engine(settings: EmbeddedSettings) -> Engine:
    """The embedded engine. Raises AgentLightningError naming the extra when torch is not installed."""
    try:
        from agentlightning_server.engines.embedded.engine import EmbeddedEngine
    except ImportError as error:
        raise AgentLightningError(
            f"the embedded engine needs {error.name}. Install it with: pip install '.[train]'"
        ) from error
    return EmbeddedEngine(settings)


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run's folder; a checkpoint's own folder is returned as it is."""
    found = sorted((folder / "checkpoints").glob("step-*"))
    return found[-1] if found else folder


def train_locally(
    runner: RunnerSettings | None,
    training: TrainSettings,
    engine: EmbeddedSettings,
    *,
    train: Sequence[Task],
    held_out: Sequence[Task] = (),
    reporter: Reporter | None = None,
    server: Settings | None = None,
    announce: Callable[[LocalServer], None] | None = None,
    checkpoint: Path | None = None,
) -> TrainResult:
    """Train an agent's policy on this machine; without a `runner`, on runners that connect from elsewhere.

    With `training.steps` 0 the held-out tasks are evaluated and nothing is trained. `checkpoint` is one to
    start from, of another run.
    """
    training.output.mkdir(parents=True, exist_ok=True)
    settings = replace(server or Settings(port=0), database=training.output / "store.db", model=engine.policy)
    with local_server(load_engine(engine), settings) as running:
        if announce is not None:
            announce(running)
        if checkpoint is not None:
            running.engine.load(newest_checkpoint(checkpoint))
        trainer = Trainer(running.engine, running.store, training, reporter)
        if runner is None:
            return trainer.run(train, held_out)
        with (
            running.store.temporary_key(Scope.RUNNER, "the runner beside the server") as key,
            local_runner(running.url, key, runner, training.output / "runner.log") as check,
        ):
            trainer.watch = check
            return trainer.run(train, held_out)
