"""Log-probabilities of a plan's response tokens, with what the gradient of a whole plan needs.

A stem is computed once; its chunks run on detached copies of its keys and values, whose gradients add up and
flow back through the stem at the end. That is the gradient of the whole, in memory of one chunk.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .packing import Chunk, Stem


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
