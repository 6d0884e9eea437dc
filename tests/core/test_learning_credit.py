"""Credit assigners and advantages: hand-computed cases, and what must hold for every episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.episodes import episode, transition

from agentlightning.bridge import LearningSettings, learnable_groups
from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.learning import (
    CREDIT,
    Estimator,
    StepGroups,
    advantages_of,
    air_weighted,
    build_batch,
    credit_named,
    discounted,
    group_advantages,
    identical,
    per_agent,
    step_advantages,
)
from agentlightning.learning.states import history, observation
from agentlightning.types import Episode

REWARDS = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=6)
FINAL = st.floats(-2, 2, width=32)


def earning(rewards: Sequence[float], final: float | None = 1.0, group: str = "g") -> Episode:
    """Calls that continue each other, with these intermediate rewards, of agents a and b in turn."""
    calls = [
        transition(list(range(1, 2 + 2 * i)), [2 + 2 * i], reward=r, agent_name="ab"[i % 2])
        for i, r in enumerate(rewards)
    ]
    return episode(*calls, final=final, group=group)


# --- credit --------------------------------------------------------------------------------------


def test_air_weighted_credit_pays_each_call_for_its_own_signals() -> None:
    assert air_weighted()(earning([0.5, 0.0, -0.25])).tolist() == [2.5, 1.0, 0.25]  # R + T r
    assert air_weighted(0.0)(earning([0.5, 0.0, -0.25])).tolist() == [1.25] * 3  # R + sum r


def test_agents_share_the_final_reward_and_keep_their_own_signals() -> None:
    assert per_agent(earning([0.5, -0.25, 0.25])).tolist() == [1.75, 0.75, 1.75]


@given(REWARDS, FINAL, st.floats(0, 2))
def test_moving_credit_within_an_episode_keeps_its_mean(
    rewards: list[float], final: float, strength: float
) -> None:
    played = earning(rewards, final)
    for credit in (identical, air_weighted(strength)):
        assert float(credit(played).mean()) == pytest.approx(played.total_return, abs=1e-4)


@given(REWARDS, FINAL)
def test_the_first_reward_to_go_is_the_return_and_each_step_keeps_its_own_reward(
    rewards: list[float], final: float
) -> None:
    played = earning(rewards, final)
    returns = discounted(1.0)(played)
    assert float(returns[0]) == pytest.approx(played.total_return, abs=1e-5)
    assert float(returns[-1]) == pytest.approx(final + rewards[-1], abs=1e-5)
    for (now, later), reward in zip(pairwise(returns.tolist()), rewards, strict=False):
        assert now - later == pytest.approx(reward, abs=1e-5)


@pytest.mark.parametrize("name", list(CREDIT))
def test_every_assigner_needs_a_final_reward_and_takes_an_episode_without_calls(name: str) -> None:
    with pytest.raises(NothingToLearn, match="no final reward"):
        CREDIT[name](earning([0.5], final=None))
    assert CREDIT[name](episode()).shape == (0,)


def doubled(played: Episode) -> np.ndarray:
    """A user's own."""
    return 2 * identical(played)


def test_a_function_of_the_users_is_credit_too() -> None:
    assert credit_named("identical") is identical
    assert credit_named("tests.core.test_learning_credit:doubled")(earning([0.0])).tolist() == [2.0]
    with pytest.raises(InvalidInput, match="identical, reward_to_go"):
        credit_named("nonsense")
    with pytest.raises(InvalidInput, match="no module"):
        credit_named("no_such_module_here:f")


# --- advantages ----------------------------------------------------------------------------------


def test_reinforce_pp_whitens_over_the_tokens_of_the_batch() -> None:
    returns = [np.array([1.0], np.float32), np.array([0.0], np.float32)]
    tokens = [np.array([1]), np.array([3])]
    first, second = group_advantages(returns, ["a", "b"], Estimator.REINFORCE_PP, tokens=tokens)
    # mean 0.25, variance over n - 1: (0.5625 + 3 * 0.0625) / 3 = 0.25
    assert (float(first[0]), float(second[0])) == pytest.approx((1.5, -0.5), abs=1e-5)


def test_reinforce_pp_with_a_baseline_compares_within_groups_first() -> None:
    returns = [np.array([v], np.float32) for v in (1.0, 0.0, 5.0, 5.0)]
    advantages = group_advantages(returns, ["a", "a", "b", "b"], Estimator.REINFORCE_PP_BASELINE)
    scale = float(np.std([0.5, -0.5, 0, 0], ddof=1))
    assert [float(a[0]) for a in advantages] == pytest.approx([0.5 / scale, -0.5 / scale, 0, 0], abs=1e-5)


def test_agents_are_compared_with_their_own_calls_only() -> None:
    played = [earning([0.5, 0.0]), earning([0.0, 0.0])]
    own = advantages_of(played, air_weighted(), Estimator.GRPO_NO_STD, by_agent=True)
    assert [a.tolist() for a in own] == [[0.5, 0.0], [-0.5, 0.0]]  # agent b did the same in both
    together = advantages_of(played, air_weighted(), Estimator.GRPO_NO_STD)
    assert together[0].tolist() == [0.75, -0.25]


@given(st.lists(REWARDS, min_size=2, max_size=4), st.sampled_from(list(Estimator)))
def test_an_agent_with_one_call_per_episode_has_advantages_that_sum_to_zero(
    shapes: list[list[float]], estimator: Estimator
) -> None:
    played = [episode(transition([1], [2], reward=rewards[0]), final=0.0) for rewards in shapes]
    advantages = advantages_of(played, air_weighted(), estimator, by_agent=True)
    assert sum(float(a[0]) for a in advantages) == pytest.approx(0, abs=1e-2)


# --- calls in the same state ---------------------------------------------------------------------

ASK = ({"role": "user", "content": "?"},)


def tool_said(text: str, call_id: str) -> tuple[dict[str, str], ...]:
    return (
        *ASK,
        {"role": "assistant", "content": f"written by the policy {call_id}"},
        {"role": "tool", "tool_call_id": call_id, "content": text},
    )


def two_steps(result: str, call_id: str, final: float) -> Episode:
    first = transition([1], [2], messages=ASK)
    second = transition([1, 2, 3], [4], messages=tool_said(result, call_id))
    return episode(first, second, final=final)


def test_calls_are_compared_where_they_were_made_in_the_same_state() -> None:
    played = [
        two_steps("seven", "c1", 1.0),
        two_steps("seven", "c2", 0.0),
        two_steps("eight", "c3", 0.0),
    ]
    steps = StepGroups(weight=1.0, gamma=1.0)
    first, second, third = step_advantages(played, steps, Estimator.GRPO_NO_STD)
    # The first calls: returns 1, 0, 0. The calls after "seven": 1, 0. After "eight": nothing to compare with.
    assert first.tolist() == pytest.approx([2 / 3, 0.5])
    assert second.tolist() == pytest.approx([-1 / 3, -0.5])
    assert third.tolist() == pytest.approx([-1 / 3, 0.0])


def test_step_groups_add_to_what_whole_episodes_earn() -> None:
    played = [two_steps("seven", "c1", 1.0), two_steps("seven", "c2", 0.0)]
    whole = advantages_of(played, estimator=Estimator.GRPO_NO_STD)
    steps = StepGroups(weight=0.5, gamma=1.0)
    both = advantages_of(played, estimator=Estimator.GRPO_NO_STD, steps=steps)
    assert (both[0] - whole[0]).tolist() == pytest.approx([0.25, 0.25])


def test_groups_do_not_share_states() -> None:
    played = [two_steps("x", "c", 1.0), replace(two_steps("x", "c", 0.0), group_id="other")]
    assert not any(a.any() for a in step_advantages(played, StepGroups()))


def test_a_state_leaves_out_what_the_policy_wrote_and_the_ids_of_calls() -> None:
    one, two = two_steps("seven", "c1", 1.0).transitions[1], two_steps("seven", "c2", 1.0).transitions[1]
    assert observation(one) == observation(two)
    assert observation(one) != observation(two_steps("eight", "c1", 1.0).transitions[1])
    assert observation(one) != observation(replace(two, agent_name="another"))
    assert history(one) == history(two)
    assert history(one) != history(replace(two, prompt_ids=np.array([9], np.int32)))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(InvalidInput, match="step groups"):
        StepGroups(weight=-1)
    with pytest.raises(InvalidInput, match="strength"):
        air_weighted(-1)


# --- what reaches the loss -----------------------------------------------------------------------


@given(
    st.lists(st.tuples(REWARDS, FINAL), min_size=2, max_size=4),
    st.sampled_from(list(CREDIT)),
    st.sampled_from(list(Estimator)),
    st.booleans(),
)
def test_merging_rows_changes_no_advantage_and_no_weight(
    shapes: list[tuple[list[float], float]], name: str, estimator: Estimator, by_agent: bool
) -> None:
    played = [earning(rewards, final) for rewards, final in shapes]
    advantages = advantages_of(played, CREDIT[name], estimator, by_agent=by_agent, steps=StepGroups())
    merged, apart = (build_batch(played, advantages, policy="policy", merge=m) for m in (True, False))
    assert merged.rows <= apart.rows
    index = [np.argsort(b.transition_index[b.response_mask], kind="stable") for b in (merged, apart)]
    for column in ("advantages", "weights", "old_logprobs"):
        left, right = (
            getattr(b, column)[b.response_mask][i] for b, i in zip((merged, apart), index, strict=True)
        )
        assert left == pytest.approx(right)


@pytest.mark.parametrize("estimator", [e for e in Estimator if e is not Estimator.REINFORCE_PP])
def test_a_group_is_learnable_where_its_returns_differ(estimator: Estimator) -> None:
    played = [earning([0.0] * n, final, group) for n, final, group in ((1, 1, "a"), (4, 0, "a"), (2, 1, "b"))]
    found = learnable_groups([*played, played[-1]], LearningSettings(estimator=estimator))
    assert (found.mixed, found.groups) == ({"a"}, 2)


@given(st.lists(REWARDS, min_size=2, max_size=5))
def test_an_episode_weighs_the_same_whatever_its_number_of_calls(shapes: list[list[float]]) -> None:
    played = [earning(rewards) for rewards in shapes]
    batch = build_batch(played, advantages_of(played), policy="policy")
    owner = np.where(batch.response_mask, batch.transition_episode[batch.transition_index], -1)
    shares = [float(batch.weights[owner == e].sum()) for e in range(len(played))]
    assert shares == pytest.approx([1 / len(played)] * len(played), abs=1e-5)
