"""Rows and weights against the batch of the embedded engine, made from the same episodes. Needs no VeRL."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support.episodes import episode, played, transition

from agentlightning.bridge import LearningSettings, make_batch
from agentlightning.errors import InvalidInput
from agentlightning.learning import Estimator, Normalise, StepGroups, discounted
from agentlightning.types import Episode
from agentlightning_server.verl.rows import Placed, Row, failed_row, make_rows, weighted

SEEDS = range(4)


def in_groups(
    episodes: list[Episode], learning: LearningSettings, placed: Placed = Placed.RETURN
) -> list[Row]:
    """Rows as they come about on VeRL: a group at a time."""
    groups = dict.fromkeys(e.group_id for e in episodes)
    rows = [make_rows([e for e in episodes if e.group_id == group], learning, placed) for group in groups]
    return [row for group in rows for row in group]


def products(rows: list[Row], learning: LearningSettings) -> np.ndarray:
    """Advantage times weight of every token, prompts included, as the batch has them."""
    values = weighted(
        [row.advantages for row in rows],
        [row.response_mask for row in rows],
        [row.rollout_id for row in rows],
        learning.normalisation,
        whitens=learning.estimator.whitens,
    )
    parts = [
        part for row, own in zip(rows, values, strict=True) for part in (np.zeros(len(row.prompt_ids)), own)
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_rows_are_those_of_the_embedded_engines_batch(seed: int, merge: bool) -> None:
    episodes, learning = played(seed), LearningSettings(merge=merge)
    rows, batch = in_groups(episodes, learning), make_batch(episodes, learning)
    assert len(rows) == batch.rows
    joined = [np.concatenate([row.prompt_ids, row.response_ids]) for row in rows]
    np.testing.assert_array_equal(np.concatenate(joined), batch.token_ids)
    for row, start, end in zip(rows, batch.row_offsets, batch.row_offsets[1:], strict=False):
        first = start + len(row.prompt_ids)
        assert row.response_mask[0]
        assert row.response_mask[-1]
        assert not batch.response_mask[start:first].any()
        np.testing.assert_array_equal(row.response_mask, batch.response_mask[first:end])
        np.testing.assert_array_equal(row.logprobs, batch.old_logprobs[first:end])
        assert not row.logprobs[~row.response_mask].any()


@pytest.mark.parametrize("normalise", list(Normalise))
@pytest.mark.parametrize("estimator", list(Estimator))
@pytest.mark.parametrize("merge", [True, False])
def test_advantages_and_weights_are_the_embedded_engines(
    estimator: Estimator, normalise: Normalise, merge: bool
) -> None:
    for seed in SEEDS:
        episodes = played(seed)
        learning = LearningSettings(
            estimator=estimator, normalise=normalise, merge=merge, credit=discounted(0.9)
        )
        batch = make_batch(episodes, learning)
        expected = batch.advantages * batch.weights
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(products(in_groups(episodes, learning), learning), expected, atol=2e-6)


def test_by_agent_and_step_groups_hold_too() -> None:
    episodes = [
        replace(e, transitions=[replace(t, agent_name=f"a{i % 2}") for i, t in enumerate(e.transitions)])
        for e in played(1)
    ]
    learning = LearningSettings(by_agent=True, steps=StepGroups(0.5, state=lambda t: t.agent_name))
    batch = make_batch(episodes, learning)
    np.testing.assert_allclose(
        products(in_groups(episodes, learning), learning), batch.advantages * batch.weights, atol=2e-6
    )


def placed_rewards(placed: Placed) -> list[list[float]]:
    one = transition([1], [2, 3], reward=0.25)
    continued = transition([1, 2, 3, 4], [5], reward=0.5)
    apart = transition([9], [8, 7])
    episodes = [episode(one, continued, apart, final=1.0)]
    return [row.rewards.tolist() for row in make_rows(episodes, LearningSettings(), placed)]


def test_rewards_stand_where_their_reader_looks() -> None:
    assert placed_rewards(Placed.EARNED) == [[0, 0.25, 0, 0.5], [0, 1.0]]
    assert placed_rewards(Placed.RETURN) == [[0, 0, 0, 1.75], [0, 1.75]]
    assert placed_rewards(Placed.FINAL) == [[0, 0, 0, 1.0], [0, 1.0]]


def test_a_row_knows_its_versions_and_its_episodes_turns() -> None:
    calls = [
        transition([1], [2], policy_version=3),
        transition([1, 2, 4], [5], policy_version=5),
        transition([7], [7], policy_version=4),
    ]
    long, short = make_rows([episode(*calls)], LearningSettings())
    assert (long.oldest_version, long.newest_version, long.turns) == (3, 5, 3)
    assert (short.oldest_version, short.newest_version, short.turns) == (4, 4, 3)


def test_an_episode_without_a_reward_or_with_other_policies_calls_only_has_no_row() -> None:
    rewarded = replace(episode(transition([1], [2])), rollout_id="rewarded")
    silent = replace(episode(transition([1], [2]), final=None), rollout_id="silent")
    foreign = replace(episode(transition([1], [2], policy="other")), rollout_id="foreign")
    rows = make_rows([silent, rewarded, foreign], LearningSettings())
    assert [row.rollout_id for row in rows] == ["rewarded"]
    assert make_rows([foreign], LearningSettings()) == []


def test_a_failed_rollout_counts_as_zero_and_teaches_nothing() -> None:
    row = failed_row("r", eos_id=2, version=7)
    assert (row.rewards.tolist(), row.response_mask.any(), row.newest_version) == ([0.0], False, 7)
    ones = np.ones(1, dtype=np.float32)
    good = np.ones(1, dtype=np.bool_)
    values = weighted([ones, ones], [good, row.response_mask], ["a", "r"], Normalise.EPISODE)
    assert [v.tolist() for v in values] == [[1.0], [0.0]]


def test_whitening_with_step_groups_is_refused() -> None:
    learning = LearningSettings(estimator=Estimator.REINFORCE_PP, steps=StepGroups())
    with pytest.raises(InvalidInput, match="whitens"):
        make_rows(played(0), learning)
