"""Draw tokens from logits, one independent stream of random numbers per request.

A token is found by inverting the cumulative distribution at a uniform number of the request's own generator,
so who else is in the batch does not change the draw. Log-probabilities are those of
softmax(logits / temperature) over the whole vocabulary, before top-p and any grammar; temperature 0 takes the
most likely token and reports the log-probability at temperature 1.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agentlightning_server.engines.base import Sampling

_BLOCK = 256  # vocabulary entries per block of the two-level cumulative sum


@dataclass(frozen=True, slots=True)
class Draw:
    """One sampled token. Uniform numbers from `low` up to `high` lead to it; none when that is not known."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request wants drawn: from which row of the logits, how, and with which uniform number."""

    row: int
    sampling: Sampling
    uniform: float
    allowed: Tensor | None = None
    """Tokens that a grammar allows, [V]; None for all."""


def draw(logits: Tensor, asks: Sequence[Ask]) -> list[Draw]:
    """One token for each ask. All asks of one row have the same temperature. logits: [B, V]."""
    temperatures = np.ones(logits.shape[0], dtype=np.float32)
    for ask in asks:
        temperatures[ask.row] = ask.sampling.temperature or 1.0
    scale = torch.from_numpy(temperatures).to(logits.device)[:, None]
    logprobs = torch.log_softmax(logits.float() / scale, -1)
    tokens, low, high = _tokens(logprobs, asks)
    rows = torch.tensor([ask.row for ask in asks], device=logits.device)
    chosen: list[list[float]] = torch.stack([logprobs[rows, tokens].double(), low, high], -1).tolist()
    ids: list[int] = tokens.tolist()
    tops = _tops(logprobs, asks)
    return [
        Draw(token, logprob, top, low, high)
        for token, (logprob, low, high), top in zip(ids, chosen, tops, strict=True)
    ]


def _tokens(logprobs: Tensor, asks: Sequence[Ask]) -> tuple[Tensor, Tensor, Tensor]:
    """Each ask's token, and the interval of uniform numbers that leads to it."""
    device = logprobs.device
    tokens = torch.zeros(len(asks), dtype=torch.long, device=device)
    low, high = (torch.zeros(len(asks), dtype=torch.float64, device=device) for _ in range(2))
    limited = [i for i, ask in enumerate(asks) if _is_limited(ask)]
    free = [i for i, ask in enumerate(asks) if not _is_limited(ask)]
    greedy = [i for i in free if asks[i].sampling.temperature == 0]
    plain = [i for i in free if asks[i].sampling.temperature]
    rows = torch.tensor([ask.row for ask in asks], device=device)
    if greedy:
        tokens[greedy] = logprobs[rows[greedy]].argmax(-1)
        high[greedy] = 1.0
    if plain:
        uniforms = torch.tensor([asks[i].uniform for i in plain], dtype=torch.float64, device=device)
        tokens[plain], low[plain], high[plain] = _invert(logprobs.exp(), rows[plain], uniforms)
    for i in limited:
        tokens[i] = _limited(logprobs[rows[i]].double(), asks[i])
    return tokens, low, high


def _is_limited(ask: Ask) -> bool:
    """Whether it draws from fewer tokens than there are, so that what others drew tells nothing of it."""
    return ask.allowed is not None or (ask.sampling.temperature != 0 and ask.sampling.top_p < 1)


def _limited(logprobs: Tensor, ask: Ask) -> Tensor:
    """Draw from what the grammar allows and, of that, the smallest set whose probability reaches top_p."""
    if ask.allowed is not None:
        logprobs = logprobs.masked_fill(~ask.allowed.to(logprobs.device), float("-inf"))
    if ask.sampling.temperature == 0:
        return logprobs.argmax(-1)
    return _nucleus(torch.softmax(logprobs, -1), ask)


def _invert(probs: Tensor, rows: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token at which each row's cumulative probability first exceeds its uniform number, and the cumulative
    probabilities before and after it. Sums are in double precision, in two levels: whole blocks first, then
    within the block."""
    padded = torch.nn.functional.pad(probs, (0, -probs.shape[1] % _BLOCK)).view(probs.shape[0], -1, _BLOCK)
    upto = padded.sum(-1, dtype=torch.float64).cumsum(-1)[rows]
    total = upto[:, -1]
    targets = (uniforms * total)[:, None]
    block = torch.searchsorted(upto, targets, right=True).clamp(max=upto.shape[1] - 1)
    before = torch.where(block > 0, upto.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = before + padded[rows, block[:, 0]].double().cumsum(-1)
    place = torch.searchsorted(inside, targets, right=True).clamp(max=_BLOCK - 1)
    low = torch.where(place > 0, inside.gather(1, (place - 1).clamp(min=0)), before)
    tokens = (block * _BLOCK + place)[:, 0].clamp(max=probs.shape[1] - 1)
    return tokens, low[:, 0] / total, inside.gather(1, place)[:, 0] / total


def _nucleus(probs: Tensor, ask: Ask) -> Tensor:
    """Draw from the smallest set of most likely tokens whose probability reaches top_p."""
    ordered, tokens = probs.sort(descending=True)
    upto = ordered.cumsum(0)
    kept = int((upto - ordered < ask.sampling.top_p * upto[-1]).sum())
    target = ask.uniform * upto[kept - 1]
    place = torch.searchsorted(upto[:kept], target, right=True).clamp(max=kept - 1)
    return tokens[place]


def _tops(logprobs: Tensor, asks: Sequence[Ask]) -> list[Sequence[tuple[int, float]]]:
    wanted = max((ask.sampling.top_logprobs for ask in asks), default=0)
    if not wanted:
        return [()] * len(asks)
    values, tokens = logprobs.topk(min(wanted, logprobs.shape[1]), -1)
    ids: list[list[int]] = tokens.tolist()
    lps: list[list[float]] = values.tolist()
    listed = [list(zip(i, lp, strict=True)) for i, lp in zip(ids, lps, strict=True)]
    return [listed[ask.row][: ask.sampling.top_logprobs] for ask in asks]
