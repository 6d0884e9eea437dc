"""What an update may be besides one clipped step: truncated importance sampling, several steps, a critic."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.server.embedded_support import (
    ADVANTAGES,
    accumulate,
    batch_of,
    difference,
    gradients,
    make_batch,
    packed_gradient,
    plain_gradient,
    plain_model,
    sampled,
    some_tokens,
    tiny_engine,
    two_calls_each,
    updater_of,
)
from tests.support.episodes import episode, transition
from torch import Tensor

from agentlightning import bridge
from agentlightning.bridge import LearningSettings
from agentlightning.errors import InvalidInput, NothingToLearn
from agentlightning.learning import Estimator
from agentlightning.learning.gae import gae, whiten
from agentlightning.types import Batch
from agentlightning_server.engines.embedded import EmbeddedEngine, EmbeddedSettings
from agentlightning_server.engines.embedded.tiny import make_tiny_model
from agentlightning_server.engines.embedded.updates import TrainingDiverged, Updater


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def trained(engine: EmbeddedEngine) -> dict[str, Tensor]:
    """Copies of what learns, the critic included."""
    policy = engine._policies["policy"]
    critic = policy.updater.critic
    heads = {} if critic is None else critic.state_dict()
    return {n: v.clone() for n, v in {**policy.weights.trainable_state(), **heads}.items()}


def counted(updater: Updater) -> list[int]:
    """Grows by one with each optimiser step from now on."""
    steps: list[int] = []

    def note(*_: Any) -> None:
        steps.append(len(steps) + 1)

    updater.optimizer.register_step_pre_hook(note)
    return steps


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# --- truncated importance sampling ---------------------------------------------------------------


def truncated(cap: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The surrogate around the policy at the start of the update, which no bound touches there."""

    def surrogate(logprobs: Tensor, sampled: Tensor, advantages: Tensor) -> Tensor:
        proximal = logprobs.detach()
        return (proximal - sampled).exp().clamp(max=cap) * (logprobs - proximal).exp() * advantages

    return surrogate


def stale() -> Batch:
    """Rollouts of a policy that is far from the one that learns from them."""
    return make_batch(two_calls_each(), ADVANTAGES, temperatures=[1.0, 0.7, 1.3] * 3)


def test_importance_sampling_leaves_the_gradient_of_fresh_rollouts_alone(folder: Path) -> None:
    engine = tiny_engine(folder)
    prompts = [some_tokens(i, 40) for i in range(4)]
    fresh = batch_of(prompts, sampled(engine, prompts), [1.0, -1.0, 0.5, -0.5])
    engine.close()
    assert (
        difference(packed_gradient(folder, fresh, importance_cap=2.0), packed_gradient(folder, fresh)) < 1e-5
    )
    metrics = updater_of(folder, importance_cap=2.0).update(fresh)
    assert metrics["importance"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("cap", [0.5, 2.0, 1e6])
def test_stale_rollouts_are_weighted_by_the_truncated_ratio(folder: Path, cap: float) -> None:
    expected = plain_gradient(folder, stale(), truncated(cap))
    assert difference(packed_gradient(folder, stale(), importance_cap=cap), expected) < 1e-4


def test_the_cap_acts_and_so_does_importance_sampling_as_a_whole(folder: Path) -> None:
    low, high = (packed_gradient(folder, stale(), importance_cap=cap) for cap in (2.0, 1e6))
    assert difference(low, high) > 0.1
    assert difference(low, packed_gradient(folder, stale())) > 0.1


def test_metrics_tell_the_mean_weight_and_that_nothing_was_clipped(folder: Path) -> None:
    batch = stale()
    ratios: list[Tensor] = []

    def note(logprobs: Tensor, sampled: Tensor, advantages: Tensor) -> Tensor:
        ratios.append((logprobs - sampled).detach())
        return logprobs

    plain_gradient(folder, batch, note)
    places = [
        batch.response_mask[a:b][1:] for a, b in zip(batch.row_offsets, batch.row_offsets[1:], strict=False)
    ]
    logs = torch.cat([r[torch.from_numpy(p)] for r, p in zip(ratios, places, strict=True)])
    metrics = updater_of(folder, importance_cap=2.0).update(batch)
    assert metrics["importance"] == pytest.approx(float(logs.exp().clamp(max=2.0).mean()), rel=1e-3)
    assert metrics["clip_fraction"] == 0.0
    assert updater_of(folder).update(batch)["clip_fraction"] > 0.1  # around the version that sampled
    assert "importance" not in updater_of(folder).update(batch)


# --- several optimiser steps ---------------------------------------------------------------------


def test_minibatches_are_steps_on_shares_of_the_rows_and_one_version(folder: Path) -> None:
    engine = tiny_engine(folder, minibatches=4, epochs=2)
    updater = engine._policies["policy"].updater
    steps = counted(updater)
    batch = make_batch(two_calls_each(), ADVANTAGES)
    metrics = engine.update(batch)
    engine.close()
    assert len(steps) == 4 * 2
    assert (engine.version("policy"), updater.updates) == (1, 1)
    assert metrics["response_tokens"] == batch.response_mask.sum()


def test_the_steps_of_an_epoch_cover_every_row_once_and_weigh_as_the_whole_does(folder: Path) -> None:
    batch = make_batch(two_calls_each(), ADVANTAGES)
    updater = updater_of(folder, minibatches=3, epochs=2, learning_rate=0.0)  # the weights stay
    steps = torch.stack(gradients(updater, batch))
    whole = packed_gradient(folder, batch)
    first, second = steps[:3], steps[3:]
    assert difference(first.mean(0), whole) < 1e-4
    assert difference(second.mean(0), whole) < 1e-4
    assert difference(first[0], second[0]) > 0.1, "every epoch has an order of its own"
    assert difference(gradients(updater, batch)[0], first[0]) > 0.1, "and so has every update"


def test_no_more_steps_than_rows(folder: Path) -> None:
    batch = make_batch(two_calls_each(1, 2), [1.0, -1.0])
    assert len(gradients(updater_of(folder, minibatches=5), batch)) == 2


def test_epochs_are_what_a_plain_loop_over_the_batch_does(folder: Path) -> None:
    batch = make_batch(two_calls_each(), ADVANTAGES)
    updater = updater_of(folder, epochs=3, learning_rate=1e-3)
    before = torch.cat([p.detach().flatten().clone() for p in updater._weights.parameters])
    metrics = updater.update(batch)
    after = torch.cat([p.detach().flatten() for p in updater._weights.parameters])

    model = plain_model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        accumulate(model, batch)
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert difference(after - before, expected - before) < 1e-2
    assert metrics["response_tokens"] == batch.response_mask.sum()


def test_the_loss_is_that_of_one_epoch(folder: Path) -> None:
    batch = make_batch(two_calls_each(), ADVANTAGES)
    one, three = (updater_of(folder, epochs=n, learning_rate=0.0).update(batch) for n in (1, 3))
    for name in ("loss", "response_tokens", "packed_tokens", "grad_norm"):
        assert three[name] == pytest.approx(one[name], rel=1e-4)


@pytest.mark.parametrize("critic", [False, True])
def test_a_step_that_diverges_takes_back_those_before_it(folder: Path, critic: bool) -> None:
    engine = tiny_engine(folder, minibatches=9, learning_rate=1e-2, critic=critic)
    good = make_batch(two_calls_each(), ADVANTAGES, rewards=ADVANTAGES)
    engine.update(good)  # so that there are moments to keep
    updater = engine._policies["policy"].updater
    steps = counted(updater)
    last = updater._parts(range(9))[-1][0]  # the row of the last step
    weights = good.weights.copy()
    weights[good.row_offsets[last + 1] - 1] = np.nan
    before = trained(engine)
    with pytest.raises(TrainingDiverged, match="update 2 is nan"):
        engine.update(replace(good, weights=weights))
    assert len(steps) == 8
    assert_same(trained(engine), before)
    assert engine.version("policy") == 1
    engine.update(good)
    changed = trained(engine)
    engine.close()

    other = tiny_engine(folder, minibatches=9, learning_rate=1e-2, critic=critic)
    for _ in range(2):
        other.update(good)
    assert_same(trained(other), changed)  # the moments were taken back too
    other.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"minibatches": 3, "epochs": 2},
        {"minibatches": 2, "critic": True},
        {"minibatches": 2, "critic": True, "lora_rank": 4, "importance_cap": 2.0},
    ],
    ids=["minibatches", "critic", "adapter"],
)
def test_a_restored_engine_goes_on_bitwise_with(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {**settings, "learning_rate": 1e-3, "warmup_updates": 2}
    prompts = [some_tokens(i, 40) for i in range(4)]

    def learn(engine: EmbeddedEngine) -> None:
        given = [1.0, -1.0, 0.5, -0.5]
        engine.update(batch_of(prompts, sampled(engine, prompts, seed=None), given, given))

    engine = tiny_engine(tmp_path / "model", **settings)
    for _ in range(2):
        learn(engine)
    engine.save(tmp_path / "checkpoint")
    for _ in range(2):
        learn(engine)
    expected = trained(engine)
    engine.close()
    restored = tiny_engine(tmp_path / "model", **settings)
    restored.load(tmp_path / "checkpoint")
    for _ in range(2):
        learn(restored)
    assert restored.version("policy") == 4
    assert_same(trained(restored), expected)
    restored.close()


def test_a_kl_penalty_pulls_at_all_rows_but_is_nothing_to_learn_from_by_itself(folder: Path) -> None:
    updater = updater_of(folder, kl_coefficient=0.1)
    with pytest.raises(NothingToLearn, match="9 rows"):
        updater.update(make_batch(two_calls_each(), [0.0] * 9))
    one = make_batch(two_calls_each(), [1.0] + [0.0] * 8)
    assert updater.update(one)["rows"] == 9
    assert updater_of(folder).update(one)["rows"] == 1


# --- the critic ----------------------------------------------------------------------------------


def with_advantages(batch: Batch, values: np.ndarray) -> Batch:
    """The batch with the advantages that a critic of these values gives."""
    advantages, _ = gae(batch, values, gamma=0.9, lam=0.8)
    return replace(batch, advantages=whiten(advantages, batch.response_mask))


def plain_states(folder: Path, batch: Batch) -> Tensor:
    """For every token the last hidden state of the place before, [N, H], by transformers alone."""
    model = plain_model(folder)
    states = torch.zeros(batch.tokens, model.config.hidden_size)
    for start, end in zip(batch.row_offsets, batch.row_offsets[1:], strict=False):
        ids = torch.tensor(batch.token_ids[start:end].tolist())
        with torch.no_grad():
            hidden = model(ids[None], output_hidden_states=True).hidden_states[-1][0]
        states[start + 1 : end] = hidden[:-1]
    return states


RATES: dict[str, Any] = {"critic": True, "gamma": 0.9, "gae_lambda": 0.8}


def earning() -> Batch:
    """Rollouts with rewards, and no advantages from any group."""
    return make_batch(two_calls_each(), [0.0] * 9, rewards=ADVANTAGES)


def test_a_new_critic_says_0_so_that_advantages_come_from_rewards_alone(folder: Path) -> None:
    batch = earning()
    arrays = updater_of(folder, **RATES)._prepared(batch, range(batch.rows))
    assert arrays.values is not None
    assert not arrays.values.any()
    expected = with_advantages(batch, np.zeros(batch.tokens, dtype=np.float32))
    np.testing.assert_allclose(arrays.advantages.numpy(), expected.advantages, atol=1e-5)


def test_the_policy_learns_from_gae_and_not_from_the_value_loss(folder: Path) -> None:
    updater = updater_of(folder, **RATES, pack_tokens=40)
    assert updater.critic is not None
    head = 0.3 * torch.randn(updater.critic.head.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        updater.critic.head.weight.copy_(head)
    batch = earning()
    expected = plain_gradient(folder, with_advantages(batch, (plain_states(folder, batch) @ head).numpy()))
    (gradient,) = gradients(updater, batch)
    assert updater.critic.head.weight.grad is None  # let go of after the step
    assert not torch.equal(updater.critic.head.weight[0].detach(), head)
    assert difference(gradient, expected) < 1e-4


def test_the_value_loss_falls_to_that_of_the_best_linear_head_while_the_policy_stays(folder: Path) -> None:
    batch = earning()
    states = plain_states(folder, batch)[torch.from_numpy(batch.response_mask)]
    inputs = torch.cat([states, torch.ones(len(states), 1)], 1)
    targets = torch.tensor(ADVANTAGES).repeat_interleave(len(states) // 9)[:, None]
    best = torch.linalg.lstsq(inputs, targets).solution
    floor = 0.5 * float((inputs @ best - targets).square().mean())

    updater = updater_of(folder, critic=True, learning_rate=0.0, critic_learning_rate=1e-2, epochs=10)
    before = [p.detach().clone() for p in updater._weights.parameters]
    losses = [updater.update(batch)["value_loss"] for _ in range(20)]
    assert all(later < sooner for sooner, later in pairwise(losses))
    assert losses[0] > 1.4 * floor
    assert losses[-1] == pytest.approx(floor, rel=0.03)
    assert all(torch.equal(p, q) for p, q in zip(updater._weights.parameters, before, strict=True))


def test_a_critic_needs_no_difference_between_rollouts(folder: Path) -> None:
    batch = make_batch(two_calls_each(1, 1), [0.0], rewards=[1.0])
    assert updater_of(folder, critic=True).update(batch)["rows"] == 1


def test_a_checkpoint_with_a_critic_needs_one_and_one_without_needs_none(tmp_path: Path) -> None:
    made = {
        critic: tiny_engine(tmp_path / "model", critic=critic, learning_rate=1e-2) for critic in (False, True)
    }
    for critic, engine in made.items():
        engine.update(make_batch(two_calls_each(1, 3), ADVANTAGES[:3], rewards=ADVANTAGES[:3]))
        engine.save(tmp_path / str(critic))
    for critic, sentence in (
        (True, "has no critic and this engine one"),
        (False, "a critic and this engine none"),
    ):
        before = trained(made[critic])
        made[critic].update(make_batch(two_calls_each(1, 3), ADVANTAGES[:3], rewards=ADVANTAGES[:3]))
        after = trained(made[critic])
        with pytest.raises(InvalidInput, match=sentence):
            made[critic].load(tmp_path / str(not critic))
        assert_same(trained(made[critic]), after)  # nothing of it was loaded
        made[critic].load(tmp_path / str(critic))
        assert_same(trained(made[critic]), before)
    for engine in made.values():
        engine.close()


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
def test_discounts_above_1_are_refused(name: str) -> None:
    wrong: dict[str, Any] = {name: 1.5}
    with pytest.raises(InvalidInput, match=name):
        EmbeddedSettings(**wrong)


# --- from episodes to the gradient ---------------------------------------------------------------

REWARDS = np.array([[1.0, 0.0, 0.5], [2.0, 2.5, 0.0]])
"""Of two groups of three."""
LENGTHS = np.array([4, 9, 2, 6, 3, 5])
"""Response tokens of each episode."""


def standardised(values: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 over all response tokens."""
    tokens = np.repeat(values.ravel(), LENGTHS)
    return (values - tokens.mean()) / tokens.std(ddof=1)


CENTRED = REWARDS - REWARDS.mean(1, keepdims=True)
BY_HAND: dict[Estimator, np.ndarray] = {
    Estimator.GRPO: CENTRED / REWARDS.std(1, ddof=1, keepdims=True),
    Estimator.GRPO_NO_STD: CENTRED,
    Estimator.DR_GRPO: CENTRED,
    Estimator.RLOO: 1.5 * CENTRED,  # R - (3 mean - R) / 2
    Estimator.REINFORCE_PP: standardised(REWARDS),
    Estimator.REINFORCE_PP_BASELINE: standardised(CENTRED),
}


@pytest.mark.parametrize("estimator", list(Estimator))
def test_an_estimator_reaches_the_gradient(folder: Path, estimator: Estimator) -> None:
    prompts = [some_tokens(i // 3, 20) for i in range(6)]
    answers = [some_tokens(100 + i, int(n)) for i, n in enumerate(LENGTHS)]
    logprobs = [np.full(n, -5.5, dtype=np.float32) for n in LENGTHS]
    played = [
        episode(transition(p, a, logprobs=old), final=float(reward), group=str(i // 3))
        for i, (p, a, old, reward) in enumerate(zip(prompts, answers, logprobs, REWARDS.ravel(), strict=True))
    ]
    batch = bridge.make_batch(played, LearningSettings(estimator=estimator))
    rows = [[(p, a, old.tolist())] for p, a, old in zip(prompts, answers, logprobs, strict=True)]
    lengths = np.full(6, 9) if estimator is Estimator.DR_GRPO else LENGTHS
    expected = make_batch(rows, BY_HAND[estimator].ravel().tolist())
    weights = np.repeat(1 / (6 * lengths), LENGTHS).astype(np.float32)
    written = np.zeros(expected.tokens, dtype=np.float32)
    written[expected.response_mask] = weights
    gradient = plain_gradient(folder, replace(expected, weights=written))
    assert difference(packed_gradient(folder, batch), gradient) < 1e-4


def test_estimators_have_gradients_of_their_own() -> None:
    different = [a.ravel() for name, a in BY_HAND.items() if name is not Estimator.DR_GRPO]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert np.abs(one - other).max() > 0.05
