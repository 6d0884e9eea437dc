"""The whole loop: server, engine, runner and agent are the real ones, each in its own process or thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.serving import serving, tiny_engine
from tests.support.waiting import wait_until

from agentlightning.bridge import LearningSettings, TrainerBridge
from agentlightning.errors import AgentLightningError, NothingToLearn
from agentlightning.types import Limits, Mode, RolloutStatus, Task
from agentlightning_server.engines.base import Completion, Sampling
from agentlightning_server.engines.embedded.engine import EmbeddedEngine
from agentlightning_server.engines.embedded.settings import EmbeddedSettings
from agentlightning_server.engines.embedded.tiny import make_tiny_model
from agentlightning_server.store import Store
from agentlightning_server.training.local import RunnerSettings, local_runner, train_locally
from agentlightning_server.training.trainer import Trainer, TrainSettings

ROOT = Path(__file__).parents[2]
AGENTS = "tests.e2e.agents"


class WitnessEngine(EmbeddedEngine):
    """The embedded engine, with a note of everything it sampled."""

    def __init__(self, settings: EmbeddedSettings) -> None:
        super().__init__(settings)
        self.sampled: list[tuple[list[int], Completion]] = []

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, policy: str) -> Completion:
        completion = await super().generate(prompt_ids, sampling, policy)
        self.sampled.append((list(prompt_ids), completion))
        return completion


@pytest.mark.parametrize("tracer", ["otel", "light"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_the_ids_in_the_batch_are_those_that_the_engine_sampled(
    tmp_path: Path, tracer: str, stream: bool
) -> None:
    settings = _engine(tmp_path)
    tasks = [Task(str(i), {"question": f"Say {i}.", "stream": stream, "reward": i % 2}) for i in range(2)]
    engine = WitnessEngine(settings)
    with serving(engine, tmp_path) as server:
        runner = RunnerSettings(f"{AGENTS}:two_turns", concurrency=4, tracer=tracer)
        with local_runner(server.url, server.key, runner, tmp_path / "runner.log"):
            bridge = TrainerBridge(server.store, "run")
            collected = bridge.collect(tasks, step=0, group_size=2, timeout_s=120)
        assert not collected.problems
        for episode in collected.episodes:
            assert [t.agent_name for t in episode.transitions] == ["assistant", "assistant"]
            assert [run.name for run in episode.agent_runs] == ["assistant", "assistant"]
            assert all(c.gateway_span_id != c.span_id for c in episode.calls), "adapter and gateway met"
        sampled = {
            (tuple(prompt), tuple(c.token_ids), tuple(np.asarray(c.logprobs, np.float32).tolist()))
            for prompt, c in engine.sampled
        }
        trained = {
            (tuple(t.prompt_ids.tolist()), tuple(t.response_ids.tolist()), tuple(t.logprobs.tolist()))
            for e in collected.episodes
            for t in e.transitions
        }
        assert trained == sampled
        assert len(engine.sampled) == 8
        batch = bridge.batch(collected.episodes)
        assert batch.transitions == 8
        assert batch.rows == 4, "the second turn continues the first, token by token"
        expected = sorted(t for _, c in engine.sampled for t in c.token_ids)
        assert sorted(batch.token_ids[batch.response_mask].tolist()) == expected


def _settings(folder: Path, **changes: object) -> TrainSettings:
    values: dict[str, object] = {
        "run_id": "run",
        "output": folder / "run",
        "steps": 12,
        "tasks_per_step": 2,
        "group_size": 8,
        "checkpoint_every": 2,
        **changes,
    }
    return TrainSettings(**values)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def _engine(folder: Path) -> EmbeddedSettings:
    model = folder / "m"
    if not model.exists():
        make_tiny_model(model)
    return EmbeddedSettings(model=str(model), learning_rate=3e-3, context_length=1024, threads=1, seed=1)


TRAIN = [Task(f"t{i}", f"word {i}") for i in range(6)]
HELD_OUT = [Task(f"v{i}", f"other {i}", "val") for i in range(24)]


def test_a_policy_learns_what_is_rewarded(tmp_path: Path) -> None:
    """A random model says "e" once in 260 tokens; trained on it, it says little else."""
    result = train_locally(
        RunnerSettings(f"{AGENTS}:say_e", concurrency=16),
        _settings(tmp_path, steps=25),
        _engine(tmp_path),
        train=TRAIN,
        held_out=HELD_OUT,
    )
    assert result.before is not None
    assert result.after is not None
    assert result.before.reward < 0.1
    assert result.after.reward > result.before.reward + 0.3
    assert result.after.version == result.steps[-1].version


TRAINER = """
    import sys
    from pathlib import Path
    from tests.e2e.test_loop import AGENTS, TRAIN, _engine, _settings
    from agentlightning_server.training.local import RunnerSettings, train_locally

    if __name__ == "__main__":
        folder = Path(sys.argv[1])
        train_locally(
            RunnerSettings(f"{AGENTS}:say_e", concurrency=16),
            _settings(folder, steps=int(sys.argv[2])),
            _engine(folder),
            train=TRAIN,
        )
"""


def test_a_killed_trainer_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed in the middle of a step and started again: every task once, in order."""
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(TRAINER))
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, str(script), str(tmp_path), "6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, timeout_s=120)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    wait_until(lambda: not _processes_of(tmp_path))
    done_before = metrics.read_text().splitlines()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=200)
    lines = metrics.read_text().splitlines()
    assert len(lines) == 6
    assert _rewards(lines)[: len(done_before)] == _rewards(done_before), "finished rollouts were reused"
    with Store(tmp_path / "run" / "store.db") as store:
        rollouts = store.rollouts()
    assert len(rollouts) == 6 * 2 * 8
    assert {r.status for r in rollouts} == {RolloutStatus.SUCCEEDED}
    order = [r.task.id for r in rollouts if r.task is not None and r.id.endswith(".0")]
    assert sorted(order[:6]) == sorted(t.id for t in TRAIN), "one epoch is every task once"
    assert sorted(order[6:]) == sorted(t.id for t in TRAIN)


def _processes_of(folder: Path) -> list[int]:
    """Processes that hold a file under the folder as an output: the runner and its attempts."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            target = os.readlink(process / "fd" / "1")
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.append(int(process.name))
    return found


def _rewards(lines: Sequence[str]) -> list[float]:
    import json

    return [json.loads(line)["reward"] for line in lines]


def test_a_hung_agent_is_ended_and_its_rollout_retried(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    with serving(tiny_engine(tmp_path), tmp_path) as server:
        runner = RunnerSettings(f"{AGENTS}:hang_once", concurrency=2)
        with local_runner(server.url, server.key, runner, tmp_path / "runner.log"):
            bridge = TrainerBridge(server.store, "run")
            limits = Limits(start_to_close_s=2)
            collected = bridge.collect([Task("t", str(mark))], step=0, limits=limits, timeout_s=60)
        assert collected.problems == {"no call of the policy was recorded": 1}
        with pytest.raises(NothingToLearn, match="empty"):
            bridge.batch(collected.episodes)
        attempts = server.store.attempts("run.train.0.0.0")
    assert [a.status.value for a in attempts] == ["timed_out", "succeeded"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_an_agent_that_raises_loses_its_own_rollout_only(tmp_path: Path) -> None:
    tasks = [Task("a", "good"), Task("b", "bad")]
    with serving(tiny_engine(tmp_path), tmp_path) as server:
        runner = RunnerSettings(f"{AGENTS}:raises", concurrency=2)
        with local_runner(server.url, server.key, runner, tmp_path / "runner.log"):
            collected = TrainerBridge(server.store, "run").collect(
                tasks, step=0, mode=Mode.VAL, limits=Limits(max_attempts=1), timeout_s=60
            )
    assert [e.task_id for e in collected.episodes] == ["a"]
    assert collected.problems["RuntimeError: the tool server is down"] == 1


def test_a_runner_that_cannot_start_ends_the_run_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(AgentLightningError, match="no module"):
        train_locally(
            RunnerSettings("no_such_module:agent"), _settings(tmp_path), _engine(tmp_path), train=TRAIN
        )


def test_steps_without_a_difference_change_nothing_and_end_the_run_with_advice(tmp_path: Path) -> None:
    with serving(EmbeddedEngine(_engine(tmp_path)), tmp_path) as server:
        runner = RunnerSettings(f"{AGENTS}:two_turns", concurrency=8)
        tasks = [Task("t", {"question": "?", "stream": False, "reward": 1})]
        with local_runner(server.url, server.key, runner, tmp_path / "runner.log"):
            settings = _settings(tmp_path, tasks_per_step=1, group_size=2, learning=LearningSettings())
            with pytest.raises(NothingToLearn, match="5 steps in a row"):
                Trainer(server.engine, server.store, settings).run(tasks)
        assert server.engine.version("policy") == 0


def test_with_a_critic_one_rollout_per_task_is_enough(tmp_path: Path) -> None:
    with serving(EmbeddedEngine(replace(_engine(tmp_path), critic=True)), tmp_path) as server:
        runner = RunnerSettings(f"{AGENTS}:two_turns", concurrency=8)
        tasks = [Task("t", {"question": "?", "stream": False, "reward": 1})]
        with local_runner(server.url, server.key, runner, tmp_path / "runner.log"):
            settings = _settings(tmp_path, steps=2, tasks_per_step=1, group_size=1)
            steps = Trainer(server.engine, server.store, settings).run(tasks).steps
    assert [step.version for step in steps] == [1, 2]
    assert all(step.update["value_loss"] > 0 for step in steps)
