"""Runs on VeRL for the tests: a tiny untied model, tasks, settings, and `agl` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from agentlightning_server.engines.embedded.tiny import make_tiny_model

ROOT = Path(__file__).parents[2]
AGENT = "tests/verl/agents.py:two_turns"
SETTINGS: Mapping[str, Any] = {
    "agentlightning": {"cpu": True, "stall_s": 3000},
    "data": {"max_prompt_length": 768, "max_response_length": 256, "train_batch_size": 4},
    "actor_rollout_ref": {
        "actor": {"optim": {"lr": 2e-3}},
        "rollout": {"n": 4, "max_num_seqs": 32, "max_num_batched_tokens": 2048},
    },
    "trainer": {"max_actor_ckpt_to_keep": 10},
}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, section by section."""
    result: dict[str, Any] = dict(base)
    for name, value in changes.items():
        inner = result.get(name)
        both = isinstance(value, dict) and isinstance(inner, dict)
        result[name] = merged(cast("Any", inner), cast("Any", value)) if both else value
    return result


@dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    folder: Path
    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        assert self.code == 0, self.stderr[-4000:]
        return json.loads(self.stdout.strip().splitlines()[-1])

    @property
    def steps(self) -> list[dict[str, Any]]:
        lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return sorted((row for row in rows if row["kind"] == "step"), key=lambda row: row["step"])


def prepare(folder: Path, changes: Mapping[str, Any] | None = None) -> None:
    """Model, tasks and settings in a folder."""
    make_tiny_model(folder / "model", hidden=128, heads=4, kv_heads=2, layers=2, tied=False)
    for name, count in (("train", 6), ("val", 2)):
        tasks = [
            {"id": f"{name}{i}", "input": {"question": f"Say something, number {i}"}} for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    settings = merged(SETTINGS, changes or {})
    settings["trainer"]["rollout_data_dir"] = str(folder / "rollouts")
    (folder / "verl.yaml").write_text(yaml.safe_dump(settings))


def command(folder: Path, *options: str) -> list[str]:
    """`agl train` on what `prepare` made."""
    return [
        *(
            sys.executable,
            "-m",
            "agentlightning_server.cli.main",
            "train",
            AGENT,
            "--engine",
            "verl",
            "--json",
        ),
        *("--config", str(folder / "verl.yaml"), "--model", str(folder / "model")),
        *("--tasks", str(folder / "train.jsonl"), "--output", str(folder / "run"), "--concurrency", "8"),
        *options,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def train(folder: Path, *options: str, timeout_s: float) -> Ended:
    """Run to the end; a run that takes longer is killed with all that it started, and fails the test."""
    out, err = folder / "stdout.txt", folder / "stderr.txt"  # pipes would stay open as long as any child
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            command(folder, *options),
            cwd=ROOT,
            env=environment(),
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            end(process)
            words = err.read_text()[-4000:]
            raise AssertionError(f"no end within {timeout_s:g} s; its last words:\n{words}") from None
    return Ended(folder, code, out.read_text(), err.read_text())


def end(process: subprocess.Popen[bytes]) -> None:
    """End a run that hangs: politely, so that it ends Ray, then by force."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
