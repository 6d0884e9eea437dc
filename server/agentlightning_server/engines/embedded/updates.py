"""One optimiser update from a batch: packed passes, gradient, clipping, AdamW.

The stem of a plan is computed once; its chunks run on detached copies of its keys and values, whose gradients
add up and flow back through the stem at the end. That is the gradient of the whole, in memory of one chunk.
Invariant: a loss or gradient that is not finite leaves weights and optimiser as they were.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
from .settings import EmbeddedSettings


class TrainingDiverged(AgentLightningError):
    """A loss or gradient was not finite; the weights were left as they were."""


class TreeView:
    """Attention over a stem and a tree of tokens after it; see `attention.KeyValueView`.

    With a stem to fill, it keeps what the layers compute; else it attends to what a filled stem kept.
    """

    def __init__(
        self, visible: Tensor, stem: StemState | None = None, *, fill: StemState | None = None
    ) -> None:
        self._stem = stem
        self._fill = fill
        tokens = visible.shape[0]
        width = stem.length if stem else 0
        self._mask = torch.cat([visible.new_ones(tokens, width), visible], 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if self._fill is not None:
            self._fill.keep(key, value)
        if self._stem is not None:
            key = torch.cat([self._stem.keys[layer], key], 2)
            value = torch.cat([self._stem.values[layer], value], 2)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=self._mask, scale=scaling
        )
        return out.transpose(1, 2)


@dataclass(slots=True)
class StemState:
    """Per layer the keys and values of a stem: as computed, and as leaves that chunks attend to."""

    length: int
    computed: list[Tensor] = field(default_factory=list[Tensor])
    keys: list[Tensor] = field(default_factory=list[Tensor])
    values: list[Tensor] = field(default_factory=list[Tensor])

    def keep(self, key: Tensor, value: Tensor) -> None:
        for tensor, leaves in ((key, self.keys), (value, self.values)):
            self.computed.append(tensor)
            leaves.append(tensor.detach().requires_grad_(tensor.requires_grad))

    def backward(self) -> None:
        """Send what the chunks' backward passes left on the leaves through the stem."""
        leaves = [leaf for pair in zip(self.keys, self.values, strict=True) for leaf in pair]
        pairs = [
            (t, leaf.grad) for t, leaf in zip(self.computed, leaves, strict=True) if leaf.grad is not None
        ]
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


def stem_state(model: Any, stem: Stem, device: torch.device) -> StemState | None:
    """Run the stem through the model."""
    if not len(stem.tokens):
        return None
    state = StemState(len(stem.tokens))
    ids = torch.from_numpy(stem.tokens).to(device)[None]
    positions = torch.arange(state.length, device=device)[None]
    causal = torch.ones(state.length, state.length, dtype=torch.bool, device=device).tril()
    view = TreeView(causal, fill=state)
    model.base_model(input_ids=ids, position_ids=positions, kv_view=view, use_cache=False)
    return state


@dataclass(frozen=True, slots=True)
class Scored:
    """What a pass says of a chunk's response tokens: log-probabilities [E], hidden states [E, H] if asked."""

    logprobs: Tensor
    hidden: Tensor | None


def score(
    model: Any,
    chunk: Chunk,
    stem: StemState | None,
    temperatures: Tensor,
    device: torch.device,
    *,
    hidden: bool = False,
) -> Scored:
    """Log-probability of each entry's token under softmax(logits / temperature).

    Only places that predict a response token pay for the output matrix, once each.
    """
    sources, place = np.unique(chunk.sources, return_inverse=True)
    kept = torch.from_numpy(sources).to(device)
    passed = model(
        input_ids=torch.from_numpy(chunk.tokens).to(device)[None],
        position_ids=torch.from_numpy(chunk.positions).to(device)[None],
        kv_view=TreeView(torch.from_numpy(chunk.visible).to(device), stem),
        use_cache=False,
        logits_to_keep=kept,
        output_hidden_states=hidden,
    )
    logits = passed.logits[0]
    targets = torch.from_numpy(chunk.targets).to(device)
    places = torch.from_numpy(place).to(device)
    logprobs = torch.zeros(len(targets), device=device)
    for temperature in temperatures.unique().tolist():
        mine = torch.nonzero(temperatures == temperature)[:, 0]
        used, back = places[mine].unique(return_inverse=True)
        scaled = (logits if len(used) == len(sources) else logits[used]).float()
        scaled = scaled if temperature == 1 else scaled / temperature
        values = scaled[back, targets[mine]] - scaled.logsumexp(-1)[back]
        logprobs = logprobs.index_put((mine,), values)
    return Scored(logprobs, passed.hidden_states[-1][0, kept][places] if hidden else None)


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
        groups: list[dict[str, Any]] = [{"params": weights.parameters, "scale": 1.0}]
        if settings.critic:
            self.critic = Critic(weights.model.config.hidden_size, weights.device)
            scale = settings.critic_learning_rate / settings.learning_rate if settings.learning_rate else 1.0
            groups.append({"params": list(self.critic.parameters()), "scale": scale})
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
        sums = _Sums()
        packed: list[Stem] = []
        norms: list[float] = []
        try:
            for part in self._parts(rows):
                stems = plan(batch, part, self._settings.pack_tokens)
                share = len(part) / len(rows)  # so that each step weighs as much as one on the whole batch
                self.optimizer.zero_grad(set_to_none=True)
                for stem in stems:
                    self._accumulate(stem, arrays, sums, 1 / share)
                norms.append(self._step())
                packed += stems
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self._weights.publish()
        return self._metrics(batch, rows, packed, sums, float(np.mean(norms)), time.perf_counter() - start)

    def _parts(self, rows: Sequence[int]) -> Iterator[Sequence[int]]:
        """The rows of each optimiser step: every epoch in its own order, cut into minibatches."""
        count = min(self._settings.minibatches, len(rows))
        order = np.random.default_rng([self._settings.seed, self.updates])
        for _ in range(self._settings.epochs):
            mixed = [rows[i] for i in order.permutation(len(rows))] if count > 1 else list(rows)
            yield from (mixed[i::count] for i in range(count))

    def _rows_to_learn_from(self, batch: Batch) -> list[int]:
        """Rows with a gradient: without a KL penalty or a critic those with an advantage."""
        matters = batch.weights != 0
        if not self._settings.kl_coefficient and self.critic is None:
            matters = matters & (batch.advantages != 0)
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
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["scale"]
        self.optimizer.step()
        return norm

    def state(self) -> Mapping[str, Any]:
        """What `restore` needs."""
        critic = None if self.critic is None else self.critic.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "critic": critic}

    def restore(self, state: Mapping[str, Any], updates: int) -> None:
        """Go on where a checkpoint was made. Raises InvalidInput when that was with a critic and this is
        without one, or the other way round."""
        if (state["critic"] is None) != (self.critic is None):
            had, has = ("no critic", "one") if self.critic is not None else ("a critic", "none")
            raise InvalidInput(f"the checkpoint has {had} and this engine {has}: set critic as it was")
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = updates

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        warmup = self._settings.warmup_updates
        return self._settings.learning_rate * min(1.0, (self.updates + 1) / (warmup + 1))

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
        return metrics | {
            "loss": sums.values["loss"],
            "grad_norm": norm,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "rows": float(len(rows)),
            "skipped_rows": float(batch.rows - len(rows)),
            "response_tokens": float(sums.tokens),
            "row_tokens": float(lengths[list(rows)].sum()),
            "packed_tokens": float(packed_tokens(stems)),
            "seconds": seconds,
        }
