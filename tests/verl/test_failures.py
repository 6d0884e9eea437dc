"""What dies during a run on VeRL, and how the run goes on: runners, the whole machine, vLLM, the disk.

Real processes, really killed. It takes a quarter of an hour: `make test-verl-failures`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentlightning.types import AttemptStatus, Mode
from agentlightning_server.store import RolloutFilter, Store

pytest.importorskip("vllm", reason="needs the environment of make verl-env")
pytest.importorskip("verl", reason="needs the environment of make verl-env")

from tests.verl.runs import AGENT, ROOT, Ended, environment, prepare, train
from tests.verl.runs import command as train_command

pytestmark = [pytest.mark.verl, pytest.mark.timeout(5400), pytest.mark.filterwarnings("default")]
PATIENCE_S = 1500.0  # for a start, which takes two minutes on idle cores


class Process:
    """A process of its own group, which writes to a file and is killed at the end whatever happens."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                arguments, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """As a power cut would."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self) -> int:
        return self._process.wait(PATIENCE_S)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None


def until(true: Callable[[], object], process: Process) -> None:
    """Wait while the process lives."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert process.alive, process.text[-3000:]
        assert time.monotonic() < deadline, process.text[-3000:]
        time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Machine:
    """`agl train` without an agent, and runners beside it, on one folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        self.port = free_port()
        options = ("--steps", str(steps), "--checkpoint-every", "1", "--port", str(self.port))
        self._train = [part for part in train_command(folder, *options) if part != AGENT]
        self._starts = 0

    def start(self) -> Process:
        self._starts += 1
        process = Process(self._train, self.folder / f"train{self._starts}.log")
        until(lambda: "--key" in process.text, process)
        return process

    def runner(self) -> Process:
        key = (self.folder / "run" / "admin.key").read_text().strip()
        arguments = [sys.executable, "-m", "agentlightning.runner", AGENT, "--concurrency", "4"]
        where = ["--server", f"http://127.0.0.1:{self.port}", "--key", key]
        return Process([*arguments, *where], self.folder / "runner.log")

    def attempts(self, step: int) -> dict[str, list[AttemptStatus]]:
        """How the attempts at each rollout of a training step ended."""
        with Store(self.folder / "run" / "store.db") as store:
            found = store.rollouts(RolloutFilter(mode=Mode.TRAIN, limit=1000))
            own = [r.id for r in found if r.group_id.split(".")[-2] == str(step)]
            return {name: [a.status for a in store.attempts(name)] for name in own}

    def ended(self, step: int) -> int:
        """Rollouts of the step that have succeeded."""
        return sum(AttemptStatus.SUCCEEDED in tries for tries in self.attempts(step).values())

    def steps(self) -> list[int]:
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row["step"] for row in map(json.loads, lines) if row["kind"] == "step"]


def engine_processes() -> list[int]:
    """vLLM's engines, which name themselves."""
    found = subprocess.run(["pgrep", "-f", "^VLLM::EngineCore"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    prepare(tmp_path)
    return Machine(tmp_path, steps=3)


def test_a_run_outlives_its_runner_its_machine_and_its_vllm(machine: Machine) -> None:
    before = set(engine_processes())
    running, runner = machine.start(), machine.runner()
    try:
        # The runner's host disappears in mid-step: its rollouts go to another one.
        until(lambda: 2 <= machine.ended(1) < 12, running)
        runner.kill()
        runner = machine.runner()
        until(lambda: machine.steps() == [0], running)
        first = machine.attempts(1)
        assert any(AttemptStatus.LOST in tries for tries in first.values())
        assert all(tries[-1] is AttemptStatus.SUCCEEDED for tries in first.values())

        # The machine goes down in mid-step.
        until(lambda: machine.ended(2) >= 2, running)
        running.kill()
        done = {name for name, tries in machine.attempts(2).items() if AttemptStatus.SUCCEEDED in tries}
        running = machine.start()
        until(lambda: machine.steps() == [0, 1], running)
        assert machine.attempts(1) == first, "a step that was learned from is not run again"
        assert all(len(machine.attempts(2)[name]) == 1 for name in done), "nor what had ended of the next"

        # vLLM dies, and there is no other replica.
        until(lambda: machine.ended(3) >= 2, running)
        for pid in set(engine_processes()) - before:
            os.kill(pid, signal.SIGKILL)
        assert running.wait() == 1
        assert re.search("agl: .*(replica|VeRL)", running.text.splitlines()[-1]), running.text[-2000:]
        running = machine.start()
        assert running.wait() == 0, running.text[-3000:]
        assert machine.steps() == [0, 1, 2]
    finally:
        runner.kill()
        if running.alive:
            running.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small disk")
def test_a_full_disk_at_a_checkpoint_ends_the_run_and_room_lets_it_go_on(tmp_path: Path) -> None:
    prepare(tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(checkpoints)], check=True)
    options = ("--steps", "1", "--checkpoint-every", "1")
    try:
        full = train(tmp_path, *options, timeout_s=PATIENCE_S)
        assert full.code == 1
        assert "VeRL ended with an error" in full.stderr
        assert "No space left" in full.stderr or "file write failed" in full.stderr
        subprocess.run(["mount", "-o", "remount,size=200m", str(checkpoints)], check=True)
        again: Ended = train(tmp_path, *options, timeout_s=PATIENCE_S)
        assert again.result["steps"] == 1
        with Store(tmp_path / "run" / "store.db") as store:
            rollouts = store.rollouts(RolloutFilter(mode=Mode.TRAIN, limit=1000))
            assert len(rollouts) == 16
            assert all(len(store.attempts(rollout.id)) == 1 for rollout in rollouts), "none was run twice"
    finally:
        subprocess.run(["umount", str(checkpoints)], check=False)
