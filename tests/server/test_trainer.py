"""The training loop over the real store; workers and engine are stood in for by what they leave behind."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tests.support.spans import gateway_call

from agentlightning import semconv
from agentlightning.bridge import LearningSettings
from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.learning import Estimator
from agentlightning.types import AttemptStatus, Batch, Claim, Limits, Reward, Rollout, Task
from agentlightning_server.store import Store
from agentlightning_server.training.order import tasks_of_step
from agentlightning_server.training.trainer import NO_DIFFERENCE, Trainer, TrainSettings

Agent = Callable[[Claim], float | None]
TRAIN = [Task("a", "a"), Task("b", "b")]
HELD_OUT = [Task("v", "v", "val")]


class Engine:
    """Counts updates, and refuses a batch without a difference, as an engine does."""

    base_model = "model"

    def __init__(self) -> None:
        self.updates: Counter[str] = Counter()
        self.batches: list[Batch] = []

    def version(self, policy: str) -> int:
        return self.updates[policy]

    def update(self, batch: Batch) -> Mapping[str, float]:
        if not batch.advantages.any():
            raise NothingToLearn("all earned the same")
        self.updates[batch.policy] += 1
        self.batches.append(batch)
        return {"loss": 0.5}

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "updates").write_text(json.dumps(self.updates))

    def load(self, directory: Path) -> None:
        self.updates = Counter(json.loads((directory / "updates").read_text()))


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

    def call(self, claim: Claim, policy: str = "policy", tokens: Sequence[int] = (3, 4, 5)) -> None:
        """A call of a policy."""
        ids: dict[str, Any] = {"rollout_id": claim.rollout.id, "attempt_id": claim.attempt.id}
        self.add_spans([gateway_call(1, [1, 2], tokens, extra={semconv.POLICY_NAME: policy}, **ids)])


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


# --- dynamic sampling ----------------------------------------------------------------------------

MANY = [Task(str(i), str(i)) for i in range(6)]
FIRST = [task.id for task in tasks_of_step(MANY, seed=0, step=0, count=2)]
OTHERS = [task.id for task in MANY if task.id not in FIRST]


def task_of(claim: Claim) -> str:
    assert claim.rollout.task is not None
    return claim.rollout.task.id


def differing(store: Served, tasks: Sequence[str]) -> Agent:
    """Rollouts of these tasks earn 0 and 1, those of the others all 1."""

    def agent(claim: Claim) -> float:
        store.call(claim)
        return float(task_of(claim) not in tasks or claim.rollout.id.endswith(".1"))

    return agent


def test_a_step_whose_groups_all_earned_the_same_collects_other_tasks(tmp_path: Path, store: Served) -> None:
    store.agent = differing(store, OTHERS)
    engine = Engine()
    (step,) = trainer(store, tmp_path, engine, max_rounds=3).run(MANY).steps
    assert [(step.groups, step.mixed_groups, step.episodes)] == [(4, 2, 8)]
    assert len(store.ran) == 8, "the second round had enough"
    assert step.problems == {}
    (batch,) = engine.batches
    assert batch.episodes == 4, "groups without a difference are left out"
    assert batch.advantages[batch.response_mask].all()
    assert batch.weights.sum() == pytest.approx(1)


def test_a_step_learns_from_all_its_groups_with_a_difference_and_no_others(
    tmp_path: Path, store: Served
) -> None:
    store.agent = differing(store, [FIRST[1], *OTHERS])
    engine = Engine()
    (step,) = trainer(store, tmp_path, engine, max_rounds=3).run(MANY).steps
    assert (step.groups, step.mixed_groups) == (4, 3)
    assert engine.batches[0].episodes == 6
    assert engine.batches[0].advantages[engine.batches[0].response_mask].all()


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_are_bounded(tmp_path: Path, store: Served, rounds: int) -> None:
    store.agent = differing(store, [])
    engine = Engine()
    (step,) = trainer(store, tmp_path, engine, max_rounds=rounds).run(MANY).steps
    assert len(store.ran) == 4 * rounds
    assert (step.groups, step.mixed_groups, step.version) == (2 * rounds, 0, 0)
    assert step.problems == {NO_DIFFERENCE: 1}
    assert engine.batches == []


def test_a_further_round_that_comes_to_nothing_leaves_the_step_what_it_has(
    tmp_path: Path, store: Served
) -> None:
    works = differing(store, [FIRST[0]])

    def others_fail(claim: Claim) -> float | None:
        return works(claim) if task_of(claim) in FIRST else raises(claim)

    store.agent = others_fail
    engine = Engine()
    (step,) = trainer(store, tmp_path, engine, max_rounds=2).run(MANY).steps
    assert engine.batches[0].episodes == 2
    assert (step.version, step.mixed_groups) == (1, 1)
    assert step.problems == {"no rollout can be used: the tool server is down (4x)": 1}


class Stops(Engine):
    """An engine whose second update is the end of the program."""

    def update(self, batch: Batch) -> Mapping[str, float]:
        if self.updates["policy"] == 1:
            raise KeyboardInterrupt
        return super().update(batch)


def test_a_step_of_several_rounds_is_resumed_from_its_rollouts(tmp_path: Path, store: Served) -> None:
    same = [task.id for task in tasks_of_step(MANY, seed=0, step=1, count=2)]
    store.agent = differing(store, [task.id for task in MANY if task.id not in same])
    changes: dict[str, Any] = {"steps": 3, "max_rounds": 3, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        trainer(store, tmp_path / "stopped", Stops(), **changes).run(MANY)
    ran = list(store.ran)
    resumed = Engine()
    trainer(store, tmp_path / "stopped", resumed, **changes).run(MANY)
    assert store.ran[: len(ran)] == ran
    assert len(set(store.ran)) == len(store.ran), "what had been run was taken again"
    assert [r for r in ran if ".train.1.round1." in r], "the step that was stopped had a second round"

    whole = Engine()
    trainer(store, tmp_path / "whole", whole, **changes).run(MANY)
    assert len(whole.batches) == 3
    for one, other in zip(resumed.batches, whole.batches[1:], strict=True):
        assert np.array_equal(one.advantages, other.advantages)
        assert one.episodes == other.episodes


def test_further_rounds_go_through_the_other_tasks_before_those_of_the_first() -> None:
    def ids(step: int, round: int) -> list[str]:
        return [task.id for task in tasks_of_step(MANY, seed=0, step=step, count=2, round=round)]

    for step in range(6):
        first, *further = (ids(step, round) for round in range(4))
        assert sorted([*first, *further[0], *further[1]]) == [task.id for task in MANY]
        assert sorted(further[2]) == sorted(first)
        assert ids(step, 1) == further[0], "the same each time"
    assert len({tuple(ids(step, 1)) for step in range(6)}) > 1
    assert [t.id for t in tasks_of_step(MANY[:1], seed=0, step=0, count=2, round=1)] == ["0", "0"]


# --- several policies ----------------------------------------------------------------------------


def test_several_policies_learn_from_the_same_episodes_each_from_its_own_calls(
    tmp_path: Path, store: Served
) -> None:
    def writes_and_checks(claim: Claim) -> float:
        store.call(claim, "writer", [3, 4])
        store.call(claim, "checker", [5, 6, 7])
        store.call(claim, "frozen", [8])
        return float(claim.rollout.id.endswith(".1"))

    store.agent = writes_and_checks
    engine = Engine()
    policies = ("writer", "checker")
    (step,) = trainer(store, tmp_path, engine, policies=policies).run(TRAIN).steps
    assert [batch.policy for batch in engine.batches] == ["writer", "checker"]
    for batch, tokens in zip(engine.batches, ([3, 4], [5, 6, 7]), strict=True):
        assert batch.episodes == 4
        assert sorted(set(batch.token_ids[batch.response_mask].tolist())) == tokens
        assert batch.advantages[batch.response_mask].all()
    assert step.versions == {"writer": 1, "checker": 1}
    assert step.update == {"writer/loss": 0.5, "checker/loss": 0.5}
    assert step.sampled_tokens == 4 * (2 + 3)
    assert step.episodes == 4
    assert len(store.ran) == 4


def test_a_step_in_which_one_policy_made_no_call_trains_the_other_and_says_so(
    tmp_path: Path, store: Served
) -> None:
    def only_writes(claim: Claim) -> float:
        store.call(claim, "writer")
        return float(claim.rollout.id.endswith(".1"))

    store.agent = only_writes
    (step,) = trainer(store, tmp_path, Engine(), policies=("checker", "writer")).run(TRAIN).steps
    assert step.versions == {"checker": 0, "writer": 1}
    assert step.update == {"writer/loss": 0.5}
    (problem,) = step.problems
    assert problem.startswith("policy checker learns nothing: the batch is empty")


def test_a_policy_whose_calls_earned_the_same_is_left_as_it_is(tmp_path: Path, store: Served) -> None:
    def checks_one_task(claim: Claim) -> float:
        store.call(claim, "writer")
        if task_of(claim) == "b":
            store.call(claim, "checker")
        return float(task_of(claim) == "a" and claim.rollout.id.endswith(".1"))

    store.agent = checks_one_task
    (step,) = trainer(store, tmp_path, Engine(), policies=("writer", "checker")).run(TRAIN).steps
    assert step.versions == {"writer": 1, "checker": 0}
    assert step.problems == {}


def test_policies_of_which_none_made_a_call_end_the_run(tmp_path: Path, store: Served) -> None:
    with pytest.raises(NothingToLearn, match="no episode has a call of the policy"):
        trainer(store, tmp_path, policies=("writer", "checker")).run(TRAIN)


def test_the_versions_of_several_policies_are_resumed(tmp_path: Path, store: Served) -> None:
    def alternates(claim: Claim) -> float:
        store.call(claim, "writer" if ".train.0." in claim.rollout.id else "checker")
        return float(claim.rollout.id.endswith(".1"))

    store.agent = alternates
    changes: dict[str, Any] = {"policies": ("writer", "checker"), "checkpoint_every": 1}
    trainer(store, tmp_path, steps=1, **changes).run(TRAIN)
    steps = trainer(store, tmp_path, steps=2, **changes).run(TRAIN).steps
    assert [step.versions for step in steps] == [{"writer": 1, "checker": 0}, {"writer": 1, "checker": 1}]


@pytest.mark.parametrize("estimator", list(Estimator))
def test_every_estimator_is_told_that_there_were_no_rewards(
    tmp_path: Path, store: Served, estimator: Estimator
) -> None:
    store.agent = store.call
    with pytest.raises(NothingToLearn, match="has a final reward"):
        trainer(store, tmp_path, learning=LearningSettings(estimator=estimator)).run(TRAIN)
