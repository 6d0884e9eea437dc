"""Ray and VeRL's trainer, started from the process that serves, and watched until they end.

VeRL's own `run_ppo` does the work, unmodified. It can wait for ever (a vLLM worker that fails while it gets
new weights is one way), so nothing here waits for it without looking: no sign of life for `stall_s` ends the
run with an error. Invariant: whatever happens, Ray is shut down and the gateway's engine is detached.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentlightning.errors import AgentLightningError, NothingToLearn
from agentlightning_server.verl.bridge import Bridge, Status
from agentlightning_server.verl.collecting import Plan
from agentlightning_server.verl.engine import VerlEngine
from agentlightning_server.verl.names import BRIDGE_ACTOR, is_ours

LOOK_S = 1.0
BRIDGE_THREADS = 8
RAY_TRIES = 3
GRACE_S = 5.0  # for Ray's processes to end by themselves


@dataclass(slots=True)
class Run:
    """VeRL's trainer under way in a thread of this process."""

    bridge: Any
    engine: VerlEngine
    stall_s: float
    logs: Path
    """Where Ray's processes write."""
    _ended: threading.Event = field(default_factory=threading.Event)
    _error: BaseException | None = None
    _attached: bool = False

    def begin(self, config: Any) -> None:
        """Start training."""
        threading.Thread(target=self._train, args=(config,), name="agentlightning-verl", daemon=True).start()

    def _train(self, config: Any) -> None:
        from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

        try:
            run_ppo(config, TaskRunnerV1)
        except BaseException as error:  # carried to the thread that watches
            self._error = error
        finally:
            self._ended.set()

    def watch(self, look: Callable[[Status], float]) -> None:
        """Return when training has ended. `look` is called every second and returns the seconds since it last
        saw something happen itself. Raises what ended VeRL, and AgentLightningError when it has stalled."""
        import ray

        while not self._ended.wait(LOOK_S):
            status: Status = ray.get(self.bridge.status.remote())
            if not self._attached and (client := ray.get(self.bridge.llm_client.remote())) is not None:
                self.engine.attach(client)
                self._attached = True
            quiet_s = min(look(status), status.idle_s)
            if not status.open and quiet_s > self.stall_s:
                raise AgentLightningError(
                    f"VeRL gave no sign of life for {quiet_s:.0f} s ({_where(status)}) and was ended: a vLLM "
                    "worker that failed while it got new weights looks like this. Its logs are in "
                    f"{self.logs}; "
                    "the same command goes on from the last checkpoint. Should a step take that long, raise "
                    "agentlightning.stall_s"
                )
        with suppress(Exception):  # what happened last; the bridge may have died with the rest
            look(ray.get(self.bridge.status.remote(), timeout=10))
        if self._error is not None:
            raise self._explained(self._error) from self._error

    def _explained(self, error: BaseException) -> BaseException:
        """An error of ours where VeRL passed one on; else VeRL's, with what is known of the rollouts."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, AgentLightningError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
        if "no materializable trajectories" in str(error):
            return NothingToLearn(f"no rollout of a step can be used: {self._problems()}")
        lines = [line for line in str(error).splitlines() if line.strip()]
        last = lines[-1].strip() if lines else type(error).__name__
        return AgentLightningError(f"VeRL ended with an error: {last}; its logs are in {self.logs}")

    def _problems(self) -> str:
        import ray

        status: Status = ray.get(self.bridge.status.remote())
        problems = status.tallies[-1].collected.problems if status.tallies else {}
        told = [f"{sentence} ({count}x)" for sentence, count in problems.items()]
        return "; ".join(told[:3]) or "no worker took one, is a runner connected?"


@contextmanager
def launched(
    config: Any,
    plan: Plan,
    engine: VerlEngine,
    *,
    url: str,
    key: str,
    environment: Mapping[str, str],
    stall_s: float,
) -> Generator[Run]:
    """Start (or join) Ray, the bridge in it, and be ready to train until the block ends."""
    import ray

    start_ray(config, environment)
    try:
        actor: Any = ray.remote(Bridge)
        options: dict[str, Any] = {"name": BRIDGE_ACTOR, "num_cpus": 1, "max_concurrency": BRIDGE_THREADS}
        own = is_ours(str(config.algorithm.adv_estimator))
        bridge = actor.options(**options).remote(url, key, plan, own_advantages=own)
        yield Run(bridge, engine, stall_s, _ray_logs())
    finally:
        engine.attach(None)
        shut_down()


def shut_down() -> None:
    """End Ray and all that runs in it for us.

    Ray kills its workers and does not know theirs: vLLM's own would stay, and hold their memory.
    """
    import psutil
    import ray

    started = [process for raylet in _raylets() for process in raylet.children(recursive=True)]
    ray.shutdown()
    _, alive = psutil.wait_procs(started, timeout=GRACE_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _raylets() -> list[Any]:
    """Of a Ray that this process started; a cluster that was joined is not ours to end."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        return [process for process in psutil.Process().children() if process.name() == "raylet"]
    return []


def start_ray(config: Any, environment: Mapping[str, str]) -> None:
    """As `run_ppo` would, which leaves a Ray that runs alone; with our variables in every process."""
    from omegaconf import OmegaConf
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    runtime_env = get_ppo_ray_runtime_env(config)
    given = OmegaConf.to_container(config.ray_kwargs.get("ray_init", {}), resolve=True)
    asked = {name: value for name, value in given.items() if value is not None}
    own_env = asked.pop("runtime_env", None) or {}
    variables = {**runtime_env.get("env_vars", {}), **environment, **own_env.pop("env_vars", {})}
    variables["TRANSFER_QUEUE_ENABLE"] = "1"
    if path := os.environ.get("PYTHONPATH"):
        variables.setdefault("PYTHONPATH", path)
    _init_ray(
        {
            "log_to_driver": False,
            **asked,
            "runtime_env": {**runtime_env, **own_env, "env_vars": variables},
        }
    )


def _init_ray(options: Mapping[str, Any]) -> None:
    """Ray gives its own processes 30 s, which a busy machine may need twice."""
    import ray

    for tries_left in reversed(range(RAY_TRIES)):
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            if not tries_left:
                raise AgentLightningError(f"Ray did not start: {error}") from error
        else:
            return


def _ray_logs() -> Path:
    import ray

    node: Any = ray._private.worker._global_node
    return Path(node.get_logs_dir_path())


def _where(status: Status) -> str:
    if not status.tallies:
        return "while it started"
    last = status.tallies[-1]
    return f"after the rollouts of {last.mode} step {last.step} had ended"
