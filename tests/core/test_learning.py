from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.episodes import episode, transition

from agentlightning.bridge import LearningSettings, make_batch
from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.learning import (
    Estimator,
    Normalise,
    build_batch,
    discounted,
    group_advantages,
    identical,
    merge_transitions,
    select,
    select_agents,
)
from agentlightning.types import Episode, Transition

TWO_CALLS = (transition([1, 2], [3]), transition([1, 2, 3, 4], [5, 6]))


# --- credit --------------------------------------------------------------------------------------


def test_identical_credit_gives_every_call_the_whole_return() -> None:
    shaped = episode(replace(TWO_CALLS[0], reward=0.25), TWO_CALLS[1], final=1.0)
    assert identical(shaped).tolist() == [1.25, 1.25]


def test_reward_to_go_looks_forward_only() -> None:
    calls = [replace(TWO_CALLS[0], reward=0.5), replace(TWO_CALLS[1], reward=0.25)]
    assert discounted(1.0)(episode(*calls, final=1.0)).tolist() == [1.75, 1.25]
    assert discounted(0.5)(episode(*calls, final=1.0)).tolist() == [1.125, 1.25]


def test_credit_without_a_final_reward_says_how_to_give_one() -> None:
    with pytest.raises(NothingToLearn, match="emit_reward"):
        identical(episode(*TWO_CALLS, final=None))


# --- advantages ----------------------------------------------------------------------------------


def returns(*values: float) -> list[np.ndarray]:
    return [np.array([v], dtype=np.float32) for v in values]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (Estimator.GRPO, [1.5, -0.5, -0.5, -0.5]),  # mean 0.25, std over n - 1 = 0.5
        (Estimator.GRPO_NO_STD, [0.75, -0.25, -0.25, -0.25]),
        (Estimator.DR_GRPO, [0.75, -0.25, -0.25, -0.25]),
        (Estimator.RLOO, [1.0, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_group_advantages_match_hand_computed_cases(estimator: Estimator, expected: list[float]) -> None:
    advantages = group_advantages(returns(1, 0, 0, 0), ["g"] * 4, estimator)
    assert [float(a[0]) for a in advantages] == pytest.approx(expected, abs=1e-5)


def test_groups_are_compared_within_themselves() -> None:
    advantages = group_advantages(returns(1, 0, 5, 5), ["a", "a", "b", "b"], Estimator.GRPO_NO_STD)
    assert [float(a[0]) for a in advantages] == [0.5, -0.5, 0.0, 0.0]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.sampled_from(list(Estimator)))
def test_advantages_of_a_group_sum_to_zero(values: list[float], estimator: Estimator) -> None:
    advantages = group_advantages(returns(*values), ["g"] * len(values), estimator)
    assert sum(float(a[0]) for a in advantages) == pytest.approx(0, abs=1e-2)


@given(st.integers(2, 6), st.floats(-5, 5))
def test_a_group_without_a_difference_has_no_advantage(size: int, value: float) -> None:
    for estimator in Estimator:
        advantages = group_advantages(returns(*[value] * size), ["g"] * size, estimator)
        assert all(not a.any() for a in advantages)


def test_a_lone_episode_has_nothing_to_compare_with() -> None:
    assert group_advantages(returns(3.0), ["g"])[0].tolist() == [0.0]


def test_an_episode_counts_once_in_its_group_whatever_its_number_of_calls() -> None:
    long = [np.full(9, 1.0, dtype=np.float32), np.zeros(1, dtype=np.float32)]
    advantages = group_advantages(long, ["g", "g"], Estimator.GRPO_NO_STD)
    assert advantages[0].tolist() == [0.5] * 9
    assert advantages[1].tolist() == [-0.5]


def test_calls_that_differ_within_equal_episodes_still_learn() -> None:
    both = [np.array([1.0, 0.0], dtype=np.float32)] * 2
    assert group_advantages(both, ["g", "g"], Estimator.GRPO_NO_STD)[0].tolist() == [0.5, -0.5]


# --- merging and batches -------------------------------------------------------------------------


def test_a_call_that_continues_another_shares_its_row() -> None:
    assert merge_transitions(TWO_CALLS) == [[0, 1]]
    assert merge_transitions(TWO_CALLS, merge=False) == [[0], [1]]


def test_a_call_whose_history_was_rewritten_starts_a_row() -> None:
    other = transition([1, 2, 9, 4], [5])
    assert merge_transitions([TWO_CALLS[0], other]) == [[0], [1]]


def test_interleaved_agents_continue_their_own_rows() -> None:
    writer = [transition([1], [2]), transition([1, 2, 3], [4])]
    checker = [transition([7], [8]), transition([7, 8, 9], [10])]
    calls = [writer[0], checker[0], writer[1], checker[1]]
    assert merge_transitions(calls) == [[0, 2], [1, 3]]


def test_a_batch_holds_the_sampled_tokens_and_masks_everything_else() -> None:
    batch = build_batch([episode(*TWO_CALLS)], [np.array([1.0, 2.0], dtype=np.float32)], policy="policy")
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.response_mask.tolist() == [False, False, True, False, True, True]
    assert batch.advantages.tolist() == [0, 0, 1, 0, 2, 2]
    assert batch.transition_index.tolist() == [-1, -1, 0, -1, 1, 1]
    assert (batch.rows, batch.tokens, batch.unmerged_tokens) == (1, 6, 9)


def test_an_episode_weighs_the_same_whatever_its_number_of_tokens() -> None:
    short = episode(transition([1], [2]), group="g")
    long = episode(transition([1], [2] * 9), transition([5], [6] * 11), group="g")
    ones = [np.ones(len(e.transitions), dtype=np.float32) for e in (short, long)]
    batch = build_batch([short, long], ones, policy="policy")
    per_episode = np.zeros(2)
    for weight, t in zip(batch.weights, batch.transition_index, strict=True):
        if t >= 0:
            per_episode[batch.transition_episode[t]] += weight
    assert per_episode.tolist() == pytest.approx([0.5, 0.5])


def test_token_and_constant_normalisation() -> None:
    short, long = episode(transition([1], [2])), episode(transition([1], [2] * 3))
    ones = [np.ones(1, dtype=np.float32)] * 2
    token = build_batch([short, long], ones, policy="policy", normalise=Normalise.TOKEN)
    assert set(token.weights[token.response_mask].tolist()) == {0.25}
    constant = build_batch([short, long], ones, policy="policy", normalise=Normalise.CONSTANT)
    assert constant.weights[constant.response_mask] == pytest.approx(np.full(4, 1 / 6))


@given(
    st.lists(
        st.lists(
            st.tuples(st.lists(st.integers(0, 9), min_size=1), st.integers(0, 9)), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=4,
    )
)
def test_merging_changes_rows_and_nothing_else(shapes: list[list[tuple[list[int], int]]]) -> None:
    episodes: list[Episode] = []
    for shape in shapes:
        calls: list[Transition] = []
        history: list[int] = []
        for context, response in shape:
            prompt = [*history, *context]
            calls.append(transition(prompt, [response]))
            history = [*prompt, response]
        episodes.append(episode(*calls))
    advantages = [np.arange(1, len(e.transitions) + 1, dtype=np.float32) for e in episodes]
    merged = build_batch(episodes, advantages, policy="policy")
    apart = build_batch(episodes, advantages, policy="policy", merge=False)
    assert merged.rows == len(episodes)
    for name in ("advantages", "weights", "old_logprobs", "temperatures"):
        by_transition = [
            sorted(zip(b.transition_index[b.response_mask], getattr(b, name)[b.response_mask], strict=True))
            for b in (merged, apart)
        ]
        assert by_transition[0] == by_transition[1]
    assert merged.tokens <= apart.tokens == merged.unmerged_tokens


def test_an_empty_batch_says_what_to_check() -> None:
    with pytest.raises(NothingToLearn, match="agl doctor"):
        build_batch([episode()], [np.zeros(0, dtype=np.float32)], policy="policy")


def test_a_batch_of_another_policy_is_refused() -> None:
    with pytest.raises(InvalidInput, match="other"):
        build_batch(
            [episode(transition([1], [2], policy="other"))], [np.ones(1, dtype=np.float32)], policy="policy"
        )


# --- selection -----------------------------------------------------------------------------------


def test_agents_are_selected_by_name_or_node_path() -> None:
    calls = [
        transition([1], [2], agent_name="writer"),
        transition([1], [3], agent_name="checker"),
        transition([1], [4], agent_name=None, node_path="flow/rewriter/model"),
    ]
    chosen = select(episode(*calls), select_agents("wri*", "*/rewriter/*"))
    assert [int(t.response_ids[0]) for t in chosen.transitions] == [2, 4]


def test_a_selector_that_matches_nothing_names_the_agents_there_are() -> None:
    learning = LearningSettings(select=select_agents("nobody"))
    with pytest.raises(NothingToLearn, match="agents seen: agent"):
        make_batch([episode(*TWO_CALLS), episode(*TWO_CALLS, final=0.0)], learning)
