"""One update from a batch: packed passes, gradient, clipping, AdamW, in one optimiser step or several.

Invariant: an update happens whole or not at all. A loss or gradient that is not finite, in whichever of its
steps, leaves weights and optimiser as they were before the first.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
import copy
import time
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentlightning.errors import AgentLightningError, InvalidInput, NothingToLearn
from agentlightning.learning.gae import gae, whiten
from agentlightning.types import Batch

from .critic import Critic, value_loss
from .losses import Clip, importance_weights, kl_penalty, policy_loss
from .packing import Chunk, Stem, packed_tokens, plan
from .policy import PolicyWeights
from .scoring import Scored, StemState, score, stem_state
from .settings import EmbeddedSettings


class TrainingDiverged(AgentLightningError):
    """A loss or gradient was not finite; the weights were left as they were."""


@dataclass(slots=True)
class _Sums:
    """Running sums over the scored tokens of an update."""

    values: defaultdict[str, float] = field(default_factory=lambda: defaultdict[str, float](float))
    tokens: int = 0

    def add(self, name: str, value: Tensor) -> None:
        self.values[name] += float(value.detach().sum())

    def mean(self, name: str) -> float:
        return self.values[name] / max(1, self.tokens)


@dataclass(slots=True)
class _Arrays:
    """The batch's per-token numbers as tensors on the device. Shapes [N]."""

    old: Tensor
    advantages: Tensor
    weights: Tensor
    temperatures: Tensor
    importance: Tensor | None = None
    """Weights of truncated importance sampling."""
    values: Tensor | None = None
    """The critic's, before the update."""
    targets: Tensor | None = None
    """What the critic's values should be."""

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> _Arrays:
        columns = (batch.old_logprobs, batch.advantages, batch.weights, batch.temperatures)
        return cls(*(_tensor(column, device) for column in columns))


def _tensor(values: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32)).to(device)


class Updater:
    """The optimiser of one policy, its critic if it has one, and the number of updates it has made."""

    def __init__(self, weights: PolicyWeights, settings: EmbeddedSettings) -> None:
        self._weights = weights
        self._settings = settings
        self._clip = Clip(settings.clip_low, settings.clip_high, settings.dual_clip)
        self.updates = 0
        self.critic: Critic | None = None
        groups: list[dict[str, Any]] = [{"params": weights.parameters}]
        if settings.critic:
            self.critic = Critic(weights.model.config.hidden_size, weights.device)
            groups.append({"params": list(self.critic.parameters())})
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def update(self, batch: Batch) -> Mapping[str, float]:
        """Apply one update and return its metrics; see `EmbeddedEngine.update`."""
        start = time.perf_counter()
        self._weights.activate()
        rows = self._rows_to_learn_from(batch)
        arrays = self._prepared(batch, rows)
        parts = self._parts(rows)
        sums = _Sums()
        packed: list[Stem] = []
        norms: list[float] = []
        with self._whole_or_not_at_all(len(parts)):
            for part in parts:
                stems = plan(batch, part, self._settings.pack_tokens)
                share = len(part) / len(rows)  # so that each step weighs as much as one on the whole batch
                self.optimizer.zero_grad(set_to_none=True)
                for stem in stems:
                    self._accumulate(stem, arrays, sums, 1 / share)
                norms.append(self._step())
                packed += stems
        self.updates += 1
        self._weights.publish()
        return self._metrics(batch, rows, packed, sums, float(np.mean(norms)), time.perf_counter() - start)

    @contextlib.contextmanager
    def _whole_or_not_at_all(self, steps: int) -> Generator[None]:
        """Take back the steps made before one that fails. A single step needs no copy to go back to."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in parameters] if steps > 1 else []
        optimizer = copy.deepcopy(self.optimizer.state_dict()) if steps > 1 else None
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=False):
                    parameter.copy_(value)
            if optimizer is not None:
                self.optimizer.load_state_dict(optimizer)
            raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _parts(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """The rows of each optimiser step: every epoch in its own order, cut into minibatches."""
        count = min(self._settings.minibatches, len(rows))
        order = np.random.default_rng([self._settings.seed, self.updates])
        parts: list[Sequence[int]] = []
        for _ in range(self._settings.epochs):
            mixed = [rows[i] for i in order.permutation(len(rows))] if count > 1 else list(rows)
            parts += [mixed[i::count] for i in range(count)]
        return parts

    def _rows_to_learn_from(self, batch: Batch) -> list[int]:
        """Rows with a gradient: all with a critic, else those with an advantage.

        A KL penalty gives the others one too, but by itself it is nothing to learn from.
        """
        matters = batch.weights != 0
        earning = matters & (batch.advantages != 0)
        if self.critic is None and not (self._settings.kl_coefficient and earning.any()):
            matters = earning
        bounds = zip(batch.row_offsets, batch.row_offsets[1:], strict=False)
        rows = [i for i, (start, end) in enumerate(bounds) if matters[start:end].any()]
        if not rows:
            raise NothingToLearn(
                f"none of the batch's {batch.rows} rows has an advantage, since within each group all earned "
                "the same: use easier or harder tasks, more rollouts per task or a finer reward"
            )
        return rows

    # --- what stays the same during an update ----------------------------------------------------

    def _prepared(self, batch: Batch, rows: Sequence[int]) -> _Arrays:
        """The batch's numbers, with what the policy and the critic say of it before they change."""
        arrays = _Arrays.of(batch, self._weights.device)
        cap = self._settings.importance_cap
        if cap is None and self.critic is None:
            return arrays
        logprobs, values = self._scored(plan(batch, rows, self._settings.pack_tokens), arrays)
        if cap is not None:
            arrays.importance = importance_weights(logprobs, arrays.old, cap)
            arrays.old = logprobs
        if self.critic is not None:
            advantages, targets = gae(
                batch, values.cpu().numpy(), gamma=self._settings.gamma, lam=self._settings.gae_lambda
            )
            arrays.values = values
            arrays.targets = _tensor(targets, self._weights.device)
            arrays.advantages = _tensor(whiten(advantages, batch.response_mask), self._weights.device)
        return arrays

    @torch.no_grad()
    def _scored(self, stems: Sequence[Stem], arrays: _Arrays) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of all response tokens, [N] each."""
        logprobs, values = arrays.old.clone(), torch.zeros_like(arrays.old)
        for stem in stems:
            state = stem_state(self._weights.model, stem, self._weights.device)
            for chunk in stem.chunks:
                entries = torch.from_numpy(chunk.entries).to(self._weights.device)
                scored = self._score(chunk, state, arrays.temperatures[entries])
                logprobs[entries] = scored.logprobs
                if self.critic is not None and scored.hidden is not None:
                    values[entries] = self.critic(scored.hidden)
        return logprobs, values

    def _score(self, chunk: Chunk, state: StemState | None, temperatures: Tensor) -> Scored:
        hidden = self.critic is not None
        return score(self._weights.model, chunk, state, temperatures, self._weights.device, hidden=hidden)

    @torch.no_grad()
    def _references(self, stem: Stem, arrays: _Arrays) -> list[Tensor]:
        """The base model's log-probabilities, chunk by chunk."""
        device = self._weights.device
        with self._weights.reference() as model:
            state = stem_state(model, stem, device)
            return [
                score(model, chunk, state, arrays.temperatures[chunk.entries], device).logprobs
                for chunk in stem.chunks
            ]

    # --- one optimiser step ----------------------------------------------------------------------

    def _accumulate(self, stem: Stem, arrays: _Arrays, sums: _Sums, scale: float) -> None:
        """Add the gradient of a stem and its chunks, `scale` times."""
        device = self._weights.device
        references = self._references(stem, arrays) if self._settings.kl_coefficient else None
        state = stem_state(self._weights.model, stem, device)
        for i, chunk in enumerate(stem.chunks):
            entries = torch.from_numpy(chunk.entries).to(device)
            scored = self._score(chunk, state, arrays.temperatures[entries])
            loss = self._loss(scored, entries, arrays, references[i] if references else None, sums)
            if not torch.isfinite(loss):
                raise TrainingDiverged(
                    f"the loss of update {self.updates + 1} is {loss.item()}, and the weights were kept: "
                    "lower learning_rate, or look for non-finite log-probabilities in the batch"
                )
            (scale * loss).backward()
        if state is not None:
            state.backward()

    def _loss(
        self, scored: Scored, entries: Tensor, arrays: _Arrays, reference: Tensor | None, sums: _Sums
    ) -> Tensor:
        logprobs = scored.logprobs
        old, weights = arrays.old[entries], arrays.weights[entries]
        tokens = policy_loss(logprobs, old, arrays.advantages[entries], self._clip)
        surrogate = tokens.loss
        if arrays.importance is not None:
            surrogate = surrogate * arrays.importance[entries]
            sums.add("importance", arrays.importance[entries])
        loss = (weights * surrogate).sum()
        if reference is not None:
            penalty = kl_penalty(logprobs, reference, self._settings.kl_estimator)
            loss = loss + self._settings.kl_coefficient * (weights * penalty).sum()
            sums.add("kl_reference", penalty)
        sums.tokens += len(entries)
        sums.add("loss", loss)
        sums.add("clip_fraction", tokens.clipped.float())
        sums.add("dual_clip_fraction", tokens.dual_clipped.float())
        sums.add("approx_kl", old - logprobs)
        sums.add("entropy", -logprobs)
        sums.add("logprob_gap", (logprobs - old).abs())
        return loss + self._value_loss(scored, entries, arrays, sums)

    def _value_loss(self, scored: Scored, entries: Tensor, arrays: _Arrays, sums: _Sums) -> Tensor:
        """The critic's loss; 0 without one."""
        if self.critic is None or scored.hidden is None or arrays.values is None or arrays.targets is None:
            return scored.logprobs.new_zeros(())
        values, targets = self.critic(scored.hidden), arrays.targets[entries]
        errors = value_loss(values, arrays.values[entries], targets, self._settings.value_clip)
        sums.add("value_loss", errors)
        sums.add("value", values)
        return (arrays.weights[entries] * errors).sum()

    def _step(self) -> float:
        parameters = self._weights.parameters
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._settings.max_grad_norm))
        if not np.isfinite(norm):
            raise TrainingDiverged(
                f"the gradient of update {self.updates + 1} has norm {norm}: the weights were not changed; "
                "lower learning_rate, or look for extreme advantages in the batch"
            )
        rates = (self._settings.learning_rate, self._settings.critic_learning_rate)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate * self._warmth
        self.optimizer.step()
        return norm

    def state(self) -> Mapping[str, Any]:
        """What `restore` needs."""
        critic = None if self.critic is None else self.critic.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "critic": critic}

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises InvalidInput when a checkpoint was made with a critic and this is without one, or the other
        way round."""
        if (state["critic"] is None) != (self.critic is None):
            had, has = ("no critic", "one") if self.critic is not None else ("a critic", "none")
            raise InvalidInput(f"the checkpoint has {had} and this engine {has}: set critic as it was")

    def restore(self, state: Mapping[str, Any], updates: int) -> None:
        """Go on where a checkpoint was made that `check` found to fit."""
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = updates

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self._settings.learning_rate * self._warmth

    @property
    def _warmth(self) -> float:
        """Share of the learning rates that the next update takes."""
        return min(1.0, (self.updates + 1) / (self._settings.warmup_updates + 1))

    def _metrics(
        self,
        batch: Batch,
        rows: Sequence[int],
        stems: Sequence[Stem],
        sums: _Sums,
        norm: float,
        seconds: float,
    ) -> dict[str, float]:
        names = ("clip_fraction", "dual_clip_fraction", "approx_kl", "entropy", "logprob_gap")
        metrics = {name: sums.mean(name) for name in names}
        optional = ("kl_reference", "importance", "value_loss", "value")
        metrics |= {name: sums.mean(name) for name in optional if name in sums.values}
        lengths = np.diff(batch.row_offsets)
        epochs = self._settings.epochs
        return metrics | {
            "loss": sums.values["loss"] / epochs,
            "grad_norm": norm,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "rows": float(len(rows)),
            "skipped_rows": float(batch.rows - len(rows)),
            "response_tokens": sums.tokens / epochs,
            "row_tokens": float(lengths[list(rows)].sum()),
            "packed_tokens": packed_tokens(stems) / epochs,
            "seconds": seconds,
        }
