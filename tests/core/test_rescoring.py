"""Stored episodes under other learning settings: what a run computed comes out again, and what changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.episodes import transition
from tests.support.spans import attempt, gateway_call, reward, rollout

from agentlightning.bridge import LearningSettings, make_batch, update_of
from agentlightning.doctor import Recorded
from agentlightning.errors import NothingToLearn
from agentlightning.learning import AIR, CREDIT, Estimator, StepGroups, air_weighted, apply_air, select_agents
from agentlightning.rescoring import rescore, score, training_episodes
from agentlightning.types import AttemptStatus, Episode, Mode, RolloutStatus, Transition

PLAIN = LearningSettings()


def played(
    group: str, sample: int, final: float | None, *rewards: float, agents: str = "ab", policy: str = "policy"
) -> Episode:
    calls = [
        transition(
            list(range(1, 2 + 2 * i)),
            [2 + 2 * i],
            span_id=f"{group}.{sample}.{i}",
            reward=r,
            agent_name=agents[i % len(agents)],
            policy=policy,
        )
        for i, r in enumerate(rewards or (0.0,))
    ]
    name = f"{group}.{sample}"
    return Episode(name, f"{name}-1", group, "t", calls, final)


GROUP = [played("run.train.0.0", 0, 1.0, 0.0, 0.5), played("run.train.0.0", 1, 0.0, 0.25)]


def test_the_same_settings_change_nothing() -> None:
    found = rescore(GROUP, PLAIN, PLAIN)
    assert all(call.before == call.after for call in found.calls)
    assert [(c.rollout_id, c.number) for c in found.calls] == [
        ("run.train.0.0.0", 0),
        ("run.train.0.0.0", 1),
        ("run.train.0.0.1", 0),
    ]
    assert (found.groups, found.mixed_before, found.mixed_after) == (1, 1, 1)


LEARNING = st.builds(
    LearningSettings,
    credit=st.sampled_from(list(CREDIT.values())),
    estimator=st.sampled_from(list(Estimator)),
    by_agent=st.booleans(),
    steps=st.none() | st.builds(StepGroups, weight=st.floats(0, 2)),
)
SHAPES = st.lists(
    st.tuples(st.floats(0, 1, width=32), st.lists(st.floats(-0.5, 0.5, width=32), min_size=1, max_size=4)),
    min_size=2,
    max_size=4,
)


@given(SHAPES, LEARNING)
def test_every_advantage_is_the_one_of_the_batch(
    shapes: list[tuple[float, list[float]]], learning: LearningSettings
) -> None:
    episodes = [played("run.train.3.0", i, final, *rewards) for i, (final, rewards) in enumerate(shapes)]
    batch = make_batch(episodes, learning)
    index = batch.transition_index
    expected = [float(batch.advantages[index == t].mean()) for t in range(batch.transitions)]
    scores = score(episodes, learning)
    assert [worth.advantage for worth in scores.calls.values()] == pytest.approx(expected, abs=1e-6)


def test_agents_are_summed_up_apart() -> None:
    found = rescore(GROUP, PLAIN, replace(PLAIN, credit=air_weighted(), estimator=Estimator.GRPO_NO_STD))
    # Returns before: 1.5, 1.5 | 0.25. After: R + T r = 1.0, 2.0 | 0.25, with means 1.5 and 0.25.
    a, b = found.agents["a"], found.agents["b"]
    assert (a.before.calls, a.before.mean_return, a.after.mean_return) == pytest.approx((2, 0.875, 0.625))
    assert (b.before.mean_return, b.after.mean_return) == pytest.approx((1.5, 2.0))
    assert (a.after.mean_advantage, b.after.mean_advantage) == pytest.approx((-0.25, 1.125))
    assert (a.after.positive, b.after.positive) == (0.5, 1.0)


def bonus(episode: Episode) -> Mapping[Transition, float]:
    return {episode.transitions[0]: 0.1} if episode.rollout_id.endswith(".0") else {}


def test_air_makes_the_difference_that_a_group_lacks() -> None:
    flat = [played("run.train.0.0", i, 0.0) for i in range(2)]
    found = rescore(flat, PLAIN, replace(PLAIN, air=AIR([bonus])))
    assert (found.groups, found.mixed_before, found.mixed_after) == (1, 0, 1)
    assert [c.before.advantage for c in found.calls if c.before] == [0.0, 0.0]
    good, bad = (c.after for c in found.calls)
    assert good is not None
    assert bad is not None
    assert good.returned == pytest.approx(0.1)
    assert good.advantage > 0 > bad.advantage
    assert all(not t.reward for e in flat for t in e.transitions)  # the episodes stay as they were


def test_calls_that_no_longer_train_have_no_worth_after() -> None:
    found = rescore(GROUP, PLAIN, replace(PLAIN, select=select_agents("a")))
    assert [(c.agent_name, c.after is None) for c in found.calls] == [("a", False), ("b", True), ("a", False)]
    assert found.agents["b"].after.calls == 0


def test_updates_are_whitened_each_by_itself() -> None:
    whitening = replace(PLAIN, estimator=Estimator.REINFORCE_PP)
    steps = [[played(f"run.train.{s}.0", i, s + 3.0 * i) for i in range(2)] for s in range(2)]
    apart = [score(step, whitening).calls for step in steps]
    together = score([*steps[0], *steps[1]], whitening).calls
    assert together == {**apart[0], **apart[1]}


def test_policies_are_compared_each_with_itself() -> None:
    both = [played("run.train.0.0", i, float(i), policy=f"p{j}") for i in range(2) for j in range(2)]
    both = [replace(e, rollout_id=f"{e.rollout_id}.{n}") for n, e in enumerate(both)]
    assert len(score(both, PLAIN).calls) == 4
    assert len(score(both, PLAIN, ["p1"]).calls) == 2


def test_why_there_is_nothing_to_learn_is_said() -> None:
    with pytest.raises(NothingToLearn, match="agents seen: a"):
        rescore(GROUP, PLAIN, replace(PLAIN, select=select_agents("nobody")))
    with pytest.raises(NothingToLearn, match="final reward"):
        score([replace(e, final_reward=None) for e in GROUP], PLAIN)
    with pytest.raises(NothingToLearn, match="no call"):
        score([], PLAIN)


@pytest.mark.parametrize(
    ("group", "update"),
    [
        ("my.run.train.12.3", ("my.run.train.12", 0)),
        ("run.train.0.retry2.1", ("run.train.0", 2)),
        ("run.train.0.round1.1", ("run.train.0", 0)),
        ("run.train.0.retry1.round2.1", ("run.train.0", 1)),
        ("live", ("", 0)),
        ("mine", ("", 0)),
    ],
)
def test_a_group_tells_its_update(group: str, update: tuple[str, int]) -> None:
    assert update_of(group) == update


# --- what is stored ------------------------------------------------------------------------------


def recorded(name: str, group: str, mode: Mode = Mode.TRAIN, *, failed: bool = False) -> Recorded:
    spans = [gateway_call(1, [1], [2]), reward(99, 1.0)]
    own = [replace(span, rollout_id=name, attempt_id=f"{name}-1") for span in spans]
    status = RolloutStatus.FAILED if failed else RolloutStatus.SUCCEEDED
    tried = AttemptStatus.FAILED if failed else AttemptStatus.SUCCEEDED
    return Recorded(
        rollout(id=name, group_id=group, mode=mode, status=status),
        [attempt(id=f"{name}-1", rollout_id=name, status=tried)],
        own,
    )


def test_a_run_learns_from_its_training_rollouts_of_the_last_retry() -> None:
    stored = [
        recorded("given up", "run.train.0.0"),
        recorded("kept", "run.train.0.retry1.0"),
        recorded("next", "run.train.1.0"),
        recorded("broken", "run.train.1.1", failed=True),
        recorded("val", "run.val.0.0", Mode.VAL),
        recorded("live-1", "live-1", Mode.LIVE),
    ]
    episodes, problems = training_episodes(stored)
    assert [e.rollout_id for e in episodes] == ["kept", "next"]
    assert problems == {"rollout failed": 1}


def test_live_rollouts_are_one_group_where_there_is_nothing_else() -> None:
    episodes, _ = training_episodes([recorded(f"live-{i}", f"live-{i}", Mode.LIVE) for i in range(2)])
    assert [e.group_id for e in episodes] == ["live", "live"]


def test_episodes_come_without_airs_rewards() -> None:
    (episode,), _ = training_episodes([recorded("r", "run.train.0.0")])
    assert not episode.signals
    assert np.isclose(apply_air(episode, AIR()).total_return, episode.total_return)
