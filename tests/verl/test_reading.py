"""What VeRL logs becomes a run's records; tasks reach VeRL in our order. Needs no VeRL."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.episodes import episode, transition
from tests.support.spans import rollout

from agentlightning.bridge import Collected
from agentlightning.types import Mode, Task
from agentlightning_server.training.order import tasks_of_step
from agentlightning_server.verl.collecting import Tally
from agentlightning_server.verl.dataset import TaskDataset, write_tasks
from agentlightning_server.verl.doctor import footprint
from agentlightning_server.verl.reading import VerlLog, eval_record, step_record

TASKS = [Task(f"t{i}", {"n": i}) for i in range(5)]


def test_the_log_is_read_line_by_line_as_it_grows(tmp_path: Path) -> None:
    log = VerlLog(tmp_path / "verl.jsonl")
    assert list(log.new()) == []
    line = json.dumps({"step": 1, "data": {"actor/lr": 1e-6, "name": "x", "bad": float("nan")}})
    log.path.write_text(line + "\n" + line[:10])
    assert list(log.new()) == [(1, {"actor/lr": 1e-6})]
    assert list(log.new()) == [], "half a line is no line"
    log.path.write_text(line + "\n" + line.replace('"step": 1', '"step": 2') + "\n")
    assert [step for step, _ in log.new()] == [2]


def tally(mode: Mode, step: int, *rewards: float, failed: int = 0) -> Tally:
    episodes = [
        replace(episode(transition([1], [2], reward=0.5), final=reward), task_id=f"t{i}")
        for i, reward in enumerate(rewards)
    ]
    rollouts = [rollout(id=f"r{i}") for i in range(len(rewards) + failed)]
    return Tally(mode, step, Collected(episodes, rollouts), groups=2, mixed=1, seconds=9.0)


def test_a_steps_record_joins_rollouts_and_update() -> None:
    metrics = {"timing_s/gen": 3.0, "timing_s/step": 10.0, "actor/grad_norm": 0.5, "val-core/x": 1.0}
    record = step_record(tally(Mode.TRAIN, 4, 0.0, 1.0), metrics, "policy")
    assert (record.step, record.version) == (3, 4)
    assert (record.reward, record.mean_return, record.episodes) == (0.5, 1.0, 2)
    assert (record.rollout_s, record.update_s) == (3.0, 7.0)
    assert record.update["actor/grad_norm"] == 0.5
    assert "val-core/x" not in record.update


def test_a_validation_counts_what_failed_as_zero() -> None:
    record = eval_record(tally(Mode.VAL, 2, 1.0, 0.5, failed=1), TASKS[:3], "policy")
    assert record.rewards == {"t0": 1.0, "t1": 0.5, "t2": 0.0}
    assert record.reward == pytest.approx(0.5)
    assert (record.step, record.held_out) == (2, 3)


def test_training_tasks_come_in_the_embedded_trainers_order(tmp_path: Path) -> None:
    data = TaskDataset([str(write_tasks(tmp_path / "tasks.json", TASKS, seed=3))])
    drawn = [json.loads(data[position]["task"])["id"] for position in range(12)]
    steps = [tasks_of_step(TASKS, seed=3, step=step, count=4) for step in range(3)]
    assert drawn == [task.id for step in steps for task in step]
    assert len(data) > 10**9


def test_other_tasks_come_as_they_are(tmp_path: Path) -> None:
    data = TaskDataset(str(write_tasks(tmp_path / "tasks.json", TASKS, seed=None)))
    assert [data[i]["index"] for i in range(len(data))] == [0, 1, 2, 3, 4]
    assert Task(**json.loads(data[4]["task"])) == TASKS[4]


def test_the_memory_of_a_3b_model_on_one_gpu() -> None:
    held = footprint(3_210_000_000, 128_256, gpus=1, tensor_parallel=1, tokens=8192)
    assert held.training == pytest.approx(47.8, abs=0.1)
    assert held.update == pytest.approx(59.6, abs=0.2)
    assert footprint(10**9, 1, gpus=8, tensor_parallel=2, tokens=1).serving_weights == pytest.approx(
        0.93, abs=0.01
    )
