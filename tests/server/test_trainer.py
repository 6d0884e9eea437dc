"""The training loop over the real store; workers and engine are stood in for by what they leave behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from tests.support.spans import gateway_call

from agentlightning.bridge import LearningSettings
from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.types import AttemptStatus, Batch, Claim, Limits, Reward, Rollout, Task
from agentlightning_server.store import Store
from agentlightning_server.training.trainer import Trainer, TrainSettings

Agent = Callable[[Claim], float | None]
TRAIN = [Task("a", "a"), Task("b", "b")]
HELD_OUT = [Task("v", "v", "val")]


class Engine:
    """Counts updates."""

    base_model = "model"

    def __init__(self) -> None:
        self.updates = 0
        self.batches: list[Batch] = []

    def version(self, _policy: str) -> int:
        return self.updates

    def update(self, batch: Batch) -> Mapping[str, float]:
        self.updates += 1
        self.batches.append(batch)
        return {"loss": 0.5}

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "updates").write_text(str(self.updates))

    def load(self, directory: Path) -> None:
        self.updates = int((directory / "updates").read_text())


class Served(Store):
    """A store whose rollouts are worked off as soon as they are queued."""

    def __init__(self, path: Path, agent: Agent) -> None:
        super().__init__(path)
        self.agent = agent
        self.ran: list[str] = []

    def enqueue(self, rollouts: Sequence[Rollout]) -> None:
        super().enqueue([replace(r, limits=Limits(max_attempts=1)) for r in rollouts])
        for claim in self.claim("w", 256):
            self.ran.append(claim.rollout.id)
            try:
                reward = self.agent(claim)
            except RuntimeError as error:
                self.finish(claim.attempt.id, "w", AttemptStatus.FAILED, str(error))
                continue
            rewards = [] if reward is None else [Reward(reward)]
            self.finish(claim.attempt.id, "w", AttemptStatus.SUCCEEDED, None, rewards)

    def call(self, claim: Claim) -> None:
        """A call of the policy."""
        ids: dict[str, Any] = {"rollout_id": claim.rollout.id, "attempt_id": claim.attempt.id}
        self.add_spans([gateway_call(1, [1, 2], [3, 4, 5], **ids)])


@pytest.fixture
def store(tmp_path: Path) -> Generator[Served]:
    def call_and_alternate(claim: Claim) -> float:
        served.call(claim)
        return float(claim.rollout.id.endswith(".1"))

    served = Served(tmp_path / "store.db", call_and_alternate)
    yield served
    served.close()


def trainer(store: Store, folder: Path, engine: Any = None, **changes: Any) -> Trainer:
    values: dict[str, Any] = {
        "run_id": "run",
        "output": folder,
        "steps": 1,
        "tasks_per_step": 2,
        "group_size": 2,
        **changes,
    }
    return Trainer(engine or cast("Any", Engine()), store, TrainSettings(**values))


def raises(_claim: Claim) -> float:
    raise RuntimeError("the tool server is down")


def test_a_step_in_which_every_rollout_failed_runs_anew_once_the_agent_is_mended(
    tmp_path: Path, store: Served
) -> None:
    mended, store.agent = store.agent, raises
    for _ in range(2):
        with pytest.raises(NothingToLearn, match=r"the tool server is down \(4x\)"):
            trainer(store, tmp_path).run(TRAIN)
    assert len(store.ran) == len(set(store.ran)) == 8, "each start tries again"
    store.agent = mended
    assert trainer(store, tmp_path).run(TRAIN).steps[0].reward == 0.5


def test_an_evaluation_in_which_every_rollout_failed_runs_anew(tmp_path: Path, store: Served) -> None:
    mended, store.agent = store.agent, raises
    with pytest.raises(NothingToLearn):
        trainer(store, tmp_path).run(TRAIN, HELD_OUT)
    store.agent = mended
    assert trainer(store, tmp_path).run(TRAIN, HELD_OUT).before is not None


def test_an_agent_without_rewards_is_told_so_and_the_step_runs_anew(tmp_path: Path, store: Served) -> None:
    mended, store.agent = store.agent, store.call
    with pytest.raises(NothingToLearn, match="has a final reward: return a number"):
        trainer(store, tmp_path).run(TRAIN)
    store.agent = mended
    assert trainer(store, tmp_path).run(TRAIN).steps[0].mixed_groups == 2


def test_rewards_that_cannot_be_used_are_one_rollouts_problem(tmp_path: Path, store: Served) -> None:
    works = store.agent

    def two_dimensions(claim: Claim) -> float | None:
        if claim.rollout.id.endswith("0.0.0"):
            store.add_reward(claim.rollout.id, Reward(1.0, "style"))
            store.add_reward(claim.rollout.id, Reward(1.0, "length"))
            store.call(claim)
            return None
        return works(claim)

    store.agent = two_dimensions
    (step,) = trainer(store, tmp_path).run(TRAIN).steps
    assert step.episodes == 3
    (problem,) = step.problems
    assert "name one of them 'reward'" in problem


def test_one_failed_rollout_leaves_the_others_and_is_counted(tmp_path: Path, store: Served) -> None:
    works = store.agent

    def one_fails(claim: Claim) -> float | None:
        return raises(claim) if claim.rollout.id.endswith("0.0.0") else works(claim)

    store.agent = one_fails
    engine = Engine()
    (step,) = trainer(store, tmp_path, engine).run(TRAIN).steps
    assert step.problems == {"the tool server is down": 1}
    assert (step.episodes, step.groups, step.mixed_groups) == (3, 2, 1)
    (batch,) = engine.batches
    alone, low, high = (batch.advantages[batch.transition_index == i] for i in range(3))
    assert not alone.any(), "nothing to compare with in its group"
    assert low == pytest.approx(-0.7071, abs=1e-4)
    assert high == pytest.approx(0.7071, abs=1e-4)
    for i in range(3):
        assert batch.weights[batch.transition_index == i].sum() == pytest.approx(1 / 3)


def test_fewer_tasks_than_a_step_takes_are_groups_of_their_own(tmp_path: Path, store: Served) -> None:
    (step,) = trainer(store, tmp_path, tasks_per_step=3).run(TRAIN[:1]).steps
    assert (step.episodes, step.groups) == (6, 3)


def test_a_group_whose_calls_are_of_another_policy_is_not_trained_on(tmp_path: Path, store: Served) -> None:
    learning = LearningSettings(policy="other")
    with pytest.raises(NothingToLearn, match="no episode has a call of the policy"):
        trainer(store, tmp_path, learning=learning).run(TRAIN)


def test_other_held_out_tasks_belong_to_another_run(tmp_path: Path, store: Served) -> None:
    trainer(store, tmp_path).run(TRAIN, HELD_OUT)
    with pytest.raises(InvalidInput, match="held_out was"):
        trainer(store, tmp_path, steps=2).run(TRAIN, [Task("v", "changed", "val")])


def test_fewer_steps_than_were_done_say_how_many_were_done(tmp_path: Path, store: Served) -> None:
    trainer(store, tmp_path, steps=3).run(TRAIN, HELD_OUT)
    after = trainer(store, tmp_path, steps=2).run(TRAIN, HELD_OUT).after
    assert after is not None
    assert (after.step, after.version) == (3, 3)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "state.json", "retries.json"])
@pytest.mark.parametrize("text", ['{"step": 1, "chec', "[]", "{}", "\0"])
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, store: Served, name: str, text: str) -> None:
    trainer(store, tmp_path).run(TRAIN, HELD_OUT)
    (tmp_path / name).write_text(text)
    if (name, text) in (("run.json", "{}"), ("retries.json", "{}")):
        return
    with pytest.raises(InvalidInput, match=re.escape(f"{tmp_path / name} is damaged")):
        trainer(store, tmp_path, steps=2).run(TRAIN, HELD_OUT)


def test_a_record_with_missing_fields_is_damage(tmp_path: Path, store: Served) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 0}) + "\n")
    with pytest.raises(InvalidInput, match=r"metrics\.jsonl is damaged"):
        trainer(store, tmp_path).run(TRAIN, HELD_OUT)
