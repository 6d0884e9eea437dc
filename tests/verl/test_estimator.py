"""Our advantages and loss through VeRL's registries, against the embedded engine's on the same episodes."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.episodes import episode, played, transition
from torch import Tensor

from agentlightning.bridge import LearningSettings, make_batch
from agentlightning.learning import Estimator, Normalise, discounted
from agentlightning.types import Episode
from agentlightning_server.engines.embedded.losses import Clip, importance_weights
from agentlightning_server.engines.embedded.losses import policy_loss as embedded_loss
from agentlightning_server.verl.names import LOSS, estimator_name, estimator_of
from agentlightning_server.verl.rows import Row, make_rows

pytest.importorskip("verl", reason="needs the environment of make test-verl-algos")
ours: Any = import_module("agentlightning_server.verl.estimator")
core_algos: Any = import_module("verl.trainer.ppo.core_algos")
ActorConfig: Any = import_module("verl.workers.config").ActorConfig

CLIP = Clip(0.2, 0.28, 3.0)
PADDING = 3
"""Rows without a sampled token, which VeRL adds to fill up a minibatch."""


class Verl:
    """Episodes as VeRL holds them: rows in another order, padded, with rows of nothing at the end."""

    def __init__(self, episodes: list[Episode], learning: LearningSettings) -> None:
        groups = dict.fromkeys(e.group_id for e in episodes)
        rows = [make_rows([e for e in episodes if e.group_id == group], learning) for group in groups]
        self.rows: list[Row] = [row for group in rows for row in group]
        self.order = np.random.default_rng(0).permutation(len(self.rows)).tolist()
        self.masks = self.padded([torch.from_numpy(row.response_mask).long() for row in self.rows])
        numbers = [
            sum(r.rollout_id == row.rollout_id for r in self.rows[:i]) for i, row in enumerate(self.rows)
        ]
        self.keys = [f"{row.rollout_id}_0_{n}" for row, n in zip(self.rows, numbers, strict=True)]
        self.stored = {
            key: torch.from_numpy(row.advantages) for key, row in zip(self.keys, self.rows, strict=True)
        }
        self.index = np.array([self.keys[i] for i in self.order] + [f"pad_{i}_0" for i in range(PADDING)])

    def padded(self, columns: list[Tensor]) -> Tensor:
        """[rows, longest response]."""
        whole = torch.nn.utils.rnn.pad_sequence([columns[i] for i in self.order], batch_first=True)
        return torch.cat([whole, torch.zeros(PADDING, whole.shape[1], dtype=whole.dtype)])

    def responses(self, values: Tensor, batch: Any) -> Tensor:
        """A column of the embedded engine's batch."""
        parts = values.split(np.diff(batch.row_offsets).tolist())
        return self.padded([part[len(row.prompt_ids) :] for part, row in zip(parts, self.rows, strict=True)])

    def fetch(self, keys: list[str]) -> list[Tensor]:
        """As the TransferQueue would."""
        return [self.stored[key] for key in keys]

    def advantages(self, learning: LearningSettings, monkeypatch: pytest.MonkeyPatch) -> Tensor:
        """As VeRL's trainer asks for them."""
        monkeypatch.setattr(ours, "fetch_advantages", self.fetch)
        estimate = core_algos.get_adv_estimator_fn(estimator_of(learning))
        advantages, _ = estimate(
            token_level_rewards=self.masks.float(), response_mask=self.masks, index=self.index, config=None
        )
        return advantages

    def loss(
        self, new: Tensor, old: Tensor, advantages: Tensor, part: slice, weights: Tensor | None = None
    ) -> Tensor:
        """Of one minibatch, as VeRL's actor computes it."""
        mask = self.masks[part]
        actor = ActorConfig(
            strategy="fsdp2",
            rollout_n=4,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio_low=CLIP.low,
            clip_ratio_high=CLIP.high,
            clip_ratio_c=CLIP.dual,
            global_batch_info={
                "dp_size": 1,
                "batch_num_tokens": int(mask.sum()),
                "global_batch_size": len(mask),
                "loss_scale_factor": None,
            },
        )
        loss, _ = core_algos.get_policy_loss_fn(LOSS)(
            old_log_prob=old[part],
            log_prob=new[part],
            advantages=advantages[part],
            response_mask=mask,
            loss_agg_mode="token-mean",
            config=actor,
            rollout_is_weights=None if weights is None else weights[part],
        )
        return loss


def drawn(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """New log-probabilities, to be differentiated, and old ones."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(size, generator=generator)
    return (old + torch.randn(size, generator=generator)).requires_grad_(), old


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("normalise", list(Normalise))
@pytest.mark.parametrize("estimator", list(Estimator))
def test_the_loss_and_its_gradient_are_the_embedded_engines(
    estimator: Estimator, normalise: Normalise, merge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        episodes = played(seed)
        learning = LearningSettings(
            estimator=estimator, normalise=normalise, merge=merge, credit=discounted(0.9)
        )
        batch = make_batch(episodes, learning)
        new, old = drawn(batch.tokens, seed)
        tokens = embedded_loss(new, old, torch.from_numpy(batch.advantages), CLIP).loss
        expected = (torch.from_numpy(batch.weights) * tokens).sum()
        verl = Verl(episodes, learning)
        advantages = verl.advantages(learning, monkeypatch)
        loss = verl.loss(verl.responses(new, batch), verl.responses(old, batch), advantages, slice(None))
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        gradients = [torch.autograd.grad(value, new)[0] for value in (expected, loss)]
        assert gradients[0].any()
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_minibatches_weigh_on_average_as_much_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    learning = LearningSettings()
    episodes = played(0, groups=5)
    batch, verl = make_batch(episodes, learning), Verl(episodes, learning)
    new, old = (verl.responses(column, batch) for column in drawn(batch.tokens, 0))
    advantages = verl.advantages(learning, monkeypatch)
    rows = len(advantages) - len(advantages) % 2
    halves = [slice(0, rows // 2), slice(rows // 2, rows)]
    parts = [verl.loss(new, old, advantages, half) for half in halves]
    whole = verl.loss(new, old, advantages, slice(0, rows))
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_truncated_importance_sampling_is_the_embedded_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    learning = LearningSettings()
    episodes = played(2)
    batch, verl = make_batch(episodes, learning), Verl(episodes, learning)
    new, proximal = drawn(batch.tokens, 1)
    sampled = proximal + torch.randn(batch.tokens, generator=torch.Generator().manual_seed(3))
    weights = importance_weights(proximal, sampled, 2.0)
    tokens = embedded_loss(new, proximal, torch.from_numpy(batch.advantages), CLIP).loss
    expected = (torch.from_numpy(batch.weights) * weights * tokens).sum()
    advantages = verl.advantages(learning, monkeypatch)
    columns = [verl.responses(column, batch) for column in (new, proximal, weights)]
    loss = verl.loss(columns[0], columns[1], advantages, slice(None), columns[2])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_an_episode_of_many_rows_weighs_as_much_as_one_of_a_single_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """VeRL's own loss would count each of the three rows."""
    three = [transition([i], [i, i + 1]) for i in range(3)]
    one = transition([9], [1, 2, 3, 4, 5, 6])
    episodes = [
        replace(episode(*calls, final=final), rollout_id=name)
        for name, calls, final in (("long", three, 1.0), ("short", [one], 0.0))
    ]
    learning = LearningSettings()
    verl = Verl(episodes, learning)
    advantages = verl.advantages(learning, monkeypatch)
    sums = {"long": 0.0, "short": 0.0}
    for key, row in zip(verl.index.tolist(), advantages, strict=True):
        if not key.startswith("pad"):
            sums[key.split("_")[0]] += float(row.sum())
    assert sums["long"] == pytest.approx(-sums["short"])
    assert sums["long"] > 0


def test_every_normalisation_has_a_name_in_verl() -> None:
    for normalise in Normalise:
        for whitens in (False, True):
            assert core_algos.get_adv_estimator_fn(estimator_name(normalise, whitens=whitens))
