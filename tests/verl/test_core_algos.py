"""Advantages and losses against VeRL's own, on random episodes of several calls.

VeRL sees what it would be given: one padded row per episode, with tokens of prompts and tools masked out. The
tests at the end show where the two differ on purpose.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support.episodes import episode, played, transition
from torch import Tensor

from agentlightning.learning import (
    Credit,
    Estimator,
    Normalise,
    advantages_of,
    build_batch,
    discounted,
    identical,
)
from agentlightning.learning.gae import gae, whiten
from agentlightning.types import Batch, Episode
from agentlightning_server.engines.embedded.critic import value_loss
from agentlightning_server.engines.embedded.losses import Clip, importance_weights, kl_penalty, policy_loss
from agentlightning_server.engines.embedded.settings import KLEstimator

pytest.importorskip("verl", reason="needs the environment of make test-verl-algos")
core_algos: Any = import_module("verl.trainer.ppo.core_algos")
rollout_correction: Any = import_module("verl.trainer.ppo.rollout_corr_helper")
AlgoConfig: Any = import_module("verl.trainer.config").AlgoConfig
ActorConfig: Any = import_module("verl.workers.config").ActorConfig

SEEDS = range(6)
ATOL = 2e-5
"""VeRL computes in float32, we in float64 with float32 results."""


# --- the same episodes for both ------------------------------------------------------------------


def batch_of(
    episodes: list[Episode],
    estimator: Estimator = Estimator.GRPO,
    credit: Credit = identical,
    *,
    normalise: Normalise = Normalise.EPISODE,
    merge: bool = True,
) -> Batch:
    advantages = advantages_of(episodes, credit, estimator)
    return build_batch(episodes, advantages, policy="policy", normalise=normalise, merge=merge)


def padded(batch: Batch, column: NDArray[Any]) -> Tensor:
    """A column of the batch as VeRL has it: [rows, longest row]."""
    rows = [
        torch.from_numpy(np.asarray(column[start:end], dtype=np.float32))
        for start, end in zip(batch.row_offsets, batch.row_offsets[1:], strict=False)
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def chosen(batch: Batch, matrix: Tensor) -> NDArray[np.float32]:
    """VeRL's numbers at the response tokens, in the batch's order."""
    return matrix[padded(batch, batch.response_mask).bool()].numpy()


def groups_of(batch: Batch) -> NDArray[np.str_]:
    """VeRL's `uid` of each row."""
    first = [
        batch.transition_index[start:][batch.response_mask[start:]][0] for start in batch.row_offsets[:-1]
    ]
    return batch.episode_group[batch.transition_episode[first]].astype(np.str_)


# --- advantages ----------------------------------------------------------------------------------

VERL: dict[Estimator, tuple[str, dict[str, Any]]] = {
    Estimator.GRPO: ("grpo", {"norm_adv_by_std_in_grpo": True}),
    Estimator.GRPO_NO_STD: ("grpo", {"norm_adv_by_std_in_grpo": False}),
    Estimator.DR_GRPO: ("grpo", {"norm_adv_by_std_in_grpo": False}),
    Estimator.RLOO: ("rloo", {}),
    Estimator.REINFORCE_PP: ("reinforce_plus_plus", {}),
    Estimator.REINFORCE_PP_BASELINE: ("reinforce_plus_plus_baseline", {}),
}


def verl_advantages(batch: Batch, estimator: Estimator) -> NDArray[np.float32]:
    name, options = VERL[estimator]
    advantages, _ = core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=padded(batch, batch.rewards),
        response_mask=padded(batch, batch.response_mask),
        index=groups_of(batch),
        config=AlgoConfig(gamma=1.0),
        **options,
    )
    return chosen(batch, advantages)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("estimator", list(Estimator))
def test_advantages_of_outcomes(estimator: Estimator, seed: int) -> None:
    """REINFORCE++ gives tokens what comes after them, the others the whole return."""
    credit = discounted(1.0) if estimator is Estimator.REINFORCE_PP else identical
    batch = batch_of(played(seed), estimator, credit)
    assert batch.rows == batch.episodes, "one row per episode, as VeRL counts them"
    ours = batch.advantages[batch.response_mask]
    assert np.abs(ours).max() > 0.5
    np.testing.assert_allclose(ours, verl_advantages(batch, estimator), atol=ATOL)


@pytest.mark.parametrize("seed", SEEDS)
def test_generalised_advantage_estimation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = batch_of(played(seed))
    values = rng.normal(size=batch.tokens).astype(np.float32)  # between the responses too, to be skipped
    gamma, lam = rng.uniform(0.5, 1, 2)
    advantages, targets = gae(batch, values, gamma=gamma, lam=lam)
    mask = padded(batch, batch.response_mask)
    theirs, their_targets = core_algos.compute_gae_advantage_return(
        padded(batch, batch.rewards), padded(batch, values), mask, gamma, lam
    )
    ours = whiten(advantages, batch.response_mask)
    np.testing.assert_allclose(ours[batch.response_mask], chosen(batch, theirs), atol=ATOL)
    np.testing.assert_allclose(targets[batch.response_mask], chosen(batch, their_targets), atol=ATOL)


# --- losses --------------------------------------------------------------------------------------

CLIPS = {
    "ppo": Clip(0.2, 0.2, 1e6),
    "clip-higher": Clip(0.2, 0.28, 3.0),
    "dual clip": Clip(0.1, 0.3, 1.5),
}
NORMALISE = {
    Normalise.EPISODE: "seq-mean-token-mean",
    Normalise.TOKEN: "token-mean",
    Normalise.CONSTANT: "seq-mean-token-sum-norm",
}


def actor(clip: Clip, mode: str, batch: Batch) -> Any:
    """VeRL's settings for a loss."""
    tokens = padded(batch, batch.response_mask).sum(1)
    constant = {"loss_scale_factor": int(tokens.max())} if mode.endswith("norm") else {}
    return ActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=clip.low,
        clip_ratio_high=clip.high,
        clip_ratio_c=clip.dual,
        loss_agg_mode=mode,
        global_batch_info=constant,
    )


def drawn(batch: Batch, seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a policy, to be differentiated, and of the one that sampled, [N] each."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(batch.tokens, generator=generator)
    new = old + spread * torch.randn(batch.tokens, generator=generator)
    return new.requires_grad_(), old


def in_rows(batch: Batch, values: Tensor) -> Tensor:
    """As `padded`, of a tensor that is differentiated."""
    lengths = np.diff(batch.row_offsets).tolist()
    return torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True)


def verl_loss(
    batch: Batch, new: Tensor, old: Tensor, clip: Clip, mode: str, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    return core_algos.get_policy_loss_fn("vanilla")(
        old_log_prob=in_rows(batch, old),
        log_prob=in_rows(batch, new),
        advantages=padded(batch, batch.advantages),
        response_mask=padded(batch, batch.response_mask),
        loss_agg_mode=mode,
        config=actor(clip, mode, batch),
        rollout_is_weights=weights,
    )


def our_loss(batch: Batch, new: Tensor, old: Tensor, clip: Clip, weights: Tensor | None = None) -> Tensor:
    """As an update adds it up."""
    tokens = policy_loss(new, old, torch.from_numpy(batch.advantages), clip).loss
    return (torch.from_numpy(batch.weights) * tokens * (1.0 if weights is None else weights)).sum()


def assert_same(ours: Tensor, theirs: Tensor, variable: Tensor) -> None:
    """The same value, and the same gradient for `variable`."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    one, other = (torch.autograd.grad(loss, variable)[0] for loss in (ours, theirs))
    assert one.any()
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("normalise", list(Normalise))
@pytest.mark.parametrize("name", list(CLIPS))
def test_policy_losses(name: str, normalise: Normalise, spread: float) -> None:
    for seed in SEEDS:
        batch = batch_of(played(seed), normalise=normalise)
        new, old = drawn(batch, seed, spread)
        theirs, _ = verl_loss(batch, new, old, CLIPS[name], NORMALISE[normalise])
        assert_same(our_loss(batch, new, old, CLIPS[name]), theirs, new)


def test_shares_of_clipped_tokens() -> None:
    for seed in SEEDS:
        batch = batch_of(played(seed))
        new, old = drawn(batch, seed, 1.0)
        clip = CLIPS["dual clip"]
        _, metrics = verl_loss(batch, new, old, clip, "token-mean")
        tokens = policy_loss(new, old, torch.from_numpy(batch.advantages), clip)
        mask = torch.from_numpy(batch.response_mask)
        assert float(tokens.clipped[mask].float().mean()) == pytest.approx(metrics["actor/pg_clipfrac"])
        dual = float(tokens.dual_clipped[mask].float().mean())
        assert dual == pytest.approx(metrics["actor/pg_clipfrac_lower"])
        assert dual > 0


@pytest.mark.parametrize("cap", [0.8, 2.0, 1e9])
def test_truncated_importance_sampling(cap: float) -> None:
    for seed in SEEDS:
        batch = batch_of(played(seed), normalise=Normalise.TOKEN)
        new, proximal = drawn(batch, seed, 0.3)
        sampled = proximal - 2 * torch.randn(batch.tokens, generator=torch.Generator().manual_seed(seed))
        theirs, _ = rollout_correction.compute_rollout_correction_weights(
            in_rows(batch, proximal - sampled), padded(batch, batch.response_mask), "token", cap
        )
        weights = importance_weights(proximal, sampled, cap)
        np.testing.assert_allclose(weights.numpy()[batch.response_mask], chosen(batch, theirs), rtol=1e-6)
        loss, _ = verl_loss(batch, new, proximal, CLIPS["clip-higher"], "token-mean", theirs)
        assert_same(our_loss(batch, new, proximal, CLIPS["clip-higher"], weights), loss, new)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalties(estimator: KLEstimator, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    new = (-5 * torch.rand(500, generator=generator)).requires_grad_()
    reference = new.detach() + spread * torch.randn(500, generator=generator)
    ours, theirs = kl_penalty(new, reference, estimator), core_algos.kl_penalty(new, reference, estimator)
    torch.testing.assert_close(ours, theirs)
    assert_same(ours.sum(), theirs.sum(), new)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_value_losses(spread: float) -> None:
    for seed in SEEDS:
        batch = batch_of(played(seed), normalise=Normalise.TOKEN)
        values, before = drawn(batch, seed, spread)
        targets = before + torch.randn(batch.tokens, generator=torch.Generator().manual_seed(seed))
        ours = (torch.from_numpy(batch.weights) * value_loss(values, before, targets, 0.5)).sum()
        theirs, _ = core_algos.compute_value_loss(
            *(in_rows(batch, column) for column in (values, targets, before)),
            padded(batch, batch.response_mask),
            0.5,
        )
        assert_same(ours, theirs, values)


# --- where the two differ on purpose -------------------------------------------------------------


@pytest.mark.parametrize("estimator", [Estimator.GRPO, Estimator.GRPO_NO_STD, Estimator.RLOO])
def test_a_group_of_one_has_nothing_to_learn_where_verl_keeps_its_return(estimator: Estimator) -> None:
    alone = episode(transition([1], [2, 3]), final=0.75, group="alone")
    batch = batch_of([alone, *played(0)], estimator)
    mine = batch.transition_index[batch.response_mask] == 0
    assert not batch.advantages[batch.response_mask][mine].any()
    theirs = verl_advantages(batch, estimator)
    assert theirs[mine] == pytest.approx([0.75, 0.75], abs=1e-5)
    np.testing.assert_allclose(batch.advantages[batch.response_mask][~mine], theirs[~mine], atol=ATOL)


def test_equal_returns_are_no_difference_where_verl_divides_rounding_by_epsilon() -> None:
    same = [episode(transition([1], [2]), final=0.1) for _ in range(7)]
    batch = batch_of(same)
    theirs = verl_advantages(batch, Estimator.GRPO)
    assert not batch.advantages.any()
    assert 0 < np.abs(theirs).max() < 0.1


def test_an_episode_weighs_the_same_in_several_rows_where_verl_weighs_rows() -> None:
    """One row per call is how VeRL gets an agent's episode when its calls do not continue each other."""
    losses: dict[bool, tuple[float, float]] = {}
    for merge in (True, False):
        batch = batch_of(played(0), merge=merge)
        places = np.flatnonzero(batch.response_mask)
        places = places[np.argsort(batch.transition_index[places], kind="stable")]
        new, old = torch.zeros(batch.tokens), torch.zeros(batch.tokens)
        new[places] = torch.randn(len(places), generator=torch.Generator().manual_seed(1)) / 10
        ours = our_loss(batch, new, old, CLIPS["clip-higher"])
        theirs, _ = verl_loss(batch, new, old, CLIPS["clip-higher"], "seq-mean-token-mean")
        losses[merge] = float(ours), float(theirs)
    merged, apart = losses[True], losses[False]
    assert merged[0] == pytest.approx(merged[1], rel=1e-4)
    assert apart[0] == pytest.approx(merged[0], rel=1e-4)
    assert abs(apart[1] - merged[1]) > 0.01
