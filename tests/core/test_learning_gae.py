"""Generalised advantage estimation over the tokens of a batch, whatever rows they lie in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.episodes import episode, transition

from agentlightning.learning import build_batch
from agentlightning.learning.gae import gae, whiten
from agentlightning.types import Batch, Episode, Transition

Shape = list[tuple[int, int, float, int]]
"""(context tokens, response tokens, intermediate reward, which of two agents) of each call"""

CALL = st.tuples(st.integers(1, 3), st.integers(1, 3), st.floats(-1, 1, width=32), st.integers(0, 1))
SHAPES = st.lists(st.lists(CALL, min_size=1, max_size=5), min_size=1, max_size=3)
RATE = st.floats(0, 1)


def conversation(shape: Shape, final: float = 1.0) -> Episode:
    """Calls of two agents in some order, each continuing that agent's own conversation."""
    histories: list[list[int]] = [[0], [1]]
    calls: list[Transition] = []
    for context, response, reward, agent in shape:
        history = histories[agent]
        prompt = [*history, *range(len(history), len(history) + context)]
        answer = list(range(len(prompt), len(prompt) + response))
        calls.append(transition(prompt, answer, reward=reward))
        histories[agent] = [*prompt, *answer]
    return episode(*calls, final=final)


def packed(episodes: Sequence[Episode], *, merge: bool = True) -> Batch:
    nothing = [np.zeros(len(e.transitions), dtype=np.float32) for e in episodes]
    return build_batch(episodes, nothing, policy="policy", merge=merge)


def in_order(batch: Batch, column: np.ndarray) -> list[float]:
    """A column's numbers at the response tokens, in the order in which they were sampled."""
    places = np.flatnonzero(batch.response_mask)
    return column[places[np.argsort(batch.transition_index[places], kind="stable")]].tolist()


def placed(batch: Batch, values: Sequence[float]) -> np.ndarray:
    """The other way round, with noise at the tokens between: nothing may read it."""
    column = np.full(batch.tokens, 1e6, dtype=np.float32)
    places = np.flatnonzero(batch.response_mask)
    column[places[np.argsort(batch.transition_index[places], kind="stable")]] = values
    return column


@pytest.mark.parametrize("merge", [True, False], ids=["one row", "two rows"])
def test_an_episode_of_two_calls_worked_by_hand(merge: bool) -> None:
    # Two calls of 2 and 1 tokens, intermediate rewards 0.5 and 0, final reward 1.
    batch = packed([conversation([(2, 2, 0.5, 0), (3, 1, 0.0, 0)])], merge=merge)
    assert batch.rows == (1 if merge else 2)
    values = placed(batch, [0.1, 0.2, 0.4])
    advantages, targets = gae(batch, values, gamma=0.5, lam=0.5)
    # delta = r + 0.5 V' - V, from the last: 1 - 0.4 = 0.6; 0.5 + 0.2 - 0.2 = 0.5; 0 + 0.1 - 0.1 = 0
    # A = delta + 0.25 A': 0.6; 0.5 + 0.15 = 0.65; 0 + 0.1625
    assert in_order(batch, advantages) == pytest.approx([0.1625, 0.65, 0.6])
    assert in_order(batch, targets) == pytest.approx([0.2625, 0.85, 1.0])
    outside = ~batch.response_mask
    assert not advantages[outside].any()
    assert not targets[outside].any()


def test_agents_that_take_turns_are_followed_in_the_order_of_their_calls() -> None:
    batch = packed([conversation([(1, 1, 0.0, agent) for agent in (0, 1, 0, 1)])])
    assert batch.rows == 2
    assert batch.transition_index[batch.response_mask].tolist() == [0, 2, 1, 3]
    advantages, _ = gae(batch, np.zeros(batch.tokens, dtype=np.float32), gamma=0.5)
    assert advantages[batch.response_mask].tolist() == [0.125, 0.5, 0.25, 1.0]


@given(SHAPES, RATE, RATE, st.integers(0, 2**32 - 1))
def test_merging_rows_changes_no_advantage_and_no_target(
    shapes: list[Shape], gamma: float, lam: float, seed: int
) -> None:
    played = [conversation(shape, final=i) for i, shape in enumerate(shapes)]
    merged, apart = packed(played), packed(played, merge=False)
    values = np.random.default_rng(seed).normal(size=int(merged.response_mask.sum())).tolist()
    both = [gae(batch, placed(batch, values), gamma=gamma, lam=lam) for batch in (merged, apart)]
    for one, other in zip(*both, strict=True):
        assert in_order(merged, one) == in_order(apart, other)


@given(SHAPES)
def test_without_values_and_discount_an_advantage_is_the_reward_to_go(shapes: list[Shape]) -> None:
    played = [conversation(shape, final=i) for i, shape in enumerate(shapes)]
    batch = packed(played)
    advantages, targets = gae(batch, np.zeros(batch.tokens, dtype=np.float32))
    expected: list[float] = []
    for i, shape in enumerate(shapes):
        for t, (_, response, _, _) in enumerate(shape):
            expected += [i + sum(reward for _, _, reward, _ in shape[t:])] * response
    assert in_order(batch, advantages) == pytest.approx(expected, abs=1e-5)
    assert in_order(batch, targets) == in_order(batch, advantages)


@given(SHAPES, RATE, st.integers(0, 2**32 - 1))
def test_without_lambda_an_advantage_is_the_one_step_error(
    shapes: list[Shape], gamma: float, seed: int
) -> None:
    batch = packed([conversation(shape) for shape in shapes[:1]])
    values = np.random.default_rng(seed).normal(size=int(batch.response_mask.sum()))
    advantages, _ = gae(batch, placed(batch, values.tolist()), gamma=gamma, lam=0.0)
    rewards = np.array(in_order(batch, batch.rewards))
    errors = rewards + gamma * np.append(values[1:], 0.0) - values
    assert in_order(batch, advantages) == pytest.approx(errors.tolist(), abs=1e-5)


def test_whitening_brings_masked_numbers_to_mean_0_and_variance_1() -> None:
    mask = np.array([True, False, True, True])
    white = whiten(np.array([1.0, 99.0, 2.0, 3.0], dtype=np.float32), mask)
    assert white.tolist() == pytest.approx([-1.0, 0.0, 0.0, 1.0])
    assert whiten(np.array([5.0], dtype=np.float32), np.array([True])).tolist() == [0.0]
