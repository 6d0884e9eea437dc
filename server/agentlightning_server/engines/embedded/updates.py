"""One optimiser update from a batch: packed passes, gradient, clipping, AdamW.

The stem of a plan is computed once; its chunks run on detached copies of its keys and values, whose gradients
add up and flow back through the stem at the end. That is the gradient of the whole, in memory of one chunk.
Invariant: a loss or gradient that is not finite leaves weights and optimiser as they were.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentlightning.errors import AgentLightningError, NothingToLearn
from agentlightning.types import Batch

from .losses import Clip, kl_penalty, policy_loss
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


def chunk_logprobs(
    model: Any, chunk: Chunk, stem: StemState | None, temperatures: Tensor, device: torch.device
) -> Tensor:
    """Log-probability of each entry's token under softmax(logits / temperature). Shape [E].

    Only places that predict a response token pay for the output matrix, once each.
    """
    sources, place = np.unique(chunk.sources, return_inverse=True)
    logits = model(
        input_ids=torch.from_numpy(chunk.tokens).to(device)[None],
        position_ids=torch.from_numpy(chunk.positions).to(device)[None],
        kv_view=TreeView(torch.from_numpy(chunk.visible).to(device), stem),
        use_cache=False,
        logits_to_keep=torch.from_numpy(sources).to(device),
    ).logits[0]
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
    return logprobs


@dataclass(slots=True)
class _Sums:
    """Running sums over the scored tokens of an update."""

    values: defaultdict[str, float] = field(default_factory=lambda: defaultdict[str, float](float))
    tokens: int = 0

    def add(self, name: str, value: Tensor) -> None:
        self.values[name] += float(value.detach().sum())

    def mean(self, name: str) -> float:
        return self.values[name] / max(1, self.tokens)


@dataclass(frozen=True, slots=True)
class _Arrays:
    """The batch's per-token numbers as tensors on the device. Shapes [N]."""

    old: Tensor
    advantages: Tensor
    weights: Tensor
    temperatures: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> _Arrays:
        columns = (batch.old_logprobs, batch.advantages, batch.weights, batch.temperatures)
        return cls(*(torch.from_numpy(np.array(c, dtype=np.float32)).to(device) for c in columns))


class Updater:
    """The optimiser of one policy and the number of updates it has made."""

    def __init__(self, weights: PolicyWeights, settings: EmbeddedSettings) -> None:
        self._weights = weights
        self._settings = settings
        self._clip = Clip(settings.clip_low, settings.clip_high, settings.dual_clip)
        self.updates = 0
        self.optimizer = torch.optim.AdamW(
            weights.parameters,
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
        stems = plan(batch, rows, self._settings.pack_tokens)
        sums = _Sums()
        arrays = _Arrays.of(batch, self._weights.device)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            for stem in stems:
                self._accumulate(stem, arrays, sums)
            norm = self._step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self._weights.publish()
        return self._metrics(batch, rows, stems, sums, norm, time.perf_counter() - start)

    def _rows_to_learn_from(self, batch: Batch) -> list[int]:
        """Rows with a gradient: without a KL penalty those with an advantage."""
        matters = batch.weights != 0
        if not self._settings.kl_coefficient:
            matters = matters & (batch.advantages != 0)
        bounds = zip(batch.row_offsets, batch.row_offsets[1:], strict=False)
        rows = [i for i, (start, end) in enumerate(bounds) if matters[start:end].any()]
        if not rows:
            raise NothingToLearn(
                f"none of the batch's {batch.rows} rows has an advantage, since within each group all earned "
                "the same: use easier or harder tasks, more rollouts per task or a finer reward"
            )
        return rows

    def _accumulate(self, stem: Stem, arrays: _Arrays, sums: _Sums) -> None:
        """Add the gradient of a stem and its chunks."""
        device = self._weights.device
        references = self._references(stem, arrays) if self._settings.kl_coefficient else None
        state = stem_state(self._weights.model, stem, device)
        for i, chunk in enumerate(stem.chunks):
            entries = torch.from_numpy(chunk.entries).to(device)
            logprobs = chunk_logprobs(self._weights.model, chunk, state, arrays.temperatures[entries], device)
            loss = self._loss(logprobs, entries, arrays, references[i] if references else None, sums)
            if not torch.isfinite(loss):
                raise TrainingDiverged(
                    f"the loss of update {self.updates + 1} is {loss.item()}, and the weights were kept: "
                    "lower learning_rate, or look for non-finite log-probabilities in the batch"
                )
            loss.backward()
        if state is not None:
            state.backward()

    @torch.no_grad()
    def _references(self, stem: Stem, arrays: _Arrays) -> list[Tensor]:
        """The base model's log-probabilities, chunk by chunk."""
        device = self._weights.device
        with self._weights.reference() as model:
            state = stem_state(model, stem, device)
            return [
                chunk_logprobs(model, chunk, state, arrays.temperatures[chunk.entries], device)
                for chunk in stem.chunks
            ]

    def _loss(
        self, logprobs: Tensor, entries: Tensor, arrays: _Arrays, reference: Tensor | None, sums: _Sums
    ) -> Tensor:
        old, weights = arrays.old[entries], arrays.weights[entries]
        tokens = policy_loss(logprobs, old, arrays.advantages[entries], self._clip)
        loss = (weights * tokens.loss).sum()
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
        return loss

    def _step(self) -> float:
        parameters = self._weights.parameters
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._settings.max_grad_norm))
        if not np.isfinite(norm):
            raise TrainingDiverged(
                f"the gradient of update {self.updates + 1} has norm {norm}: the weights were not changed; "
                "lower learning_rate, or look for extreme advantages in the batch"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.updates += 1
        return norm

    def state(self) -> Mapping[str, Any]:
        """What `restore` needs."""
        return self.optimizer.state_dict()

    def restore(self, state: Mapping[str, Any], updates: int) -> None:
        """Go on where a checkpoint was made."""
        self.optimizer.load_state_dict(dict(state))
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
        if self._settings.kl_coefficient:
            metrics["kl_reference"] = sums.mean("kl_reference")
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
