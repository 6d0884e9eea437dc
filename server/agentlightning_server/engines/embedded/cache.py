"""Keys and values of decoded tokens: rows that grow a token at a time, and trunks that many rows share.

    trunk (a long common prefix, stored once)   <--- rows that start with it (own tokens only)

What a row holds stays until its memory is needed for another, so that a later prompt that continues it
costs only its new tokens. This module stores and attends; which row continues what is `decoding`'s business.
Invariant: a row's history is `trunk.tokens + row.tokens`, and exactly these have keys and values stored.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class Trunk:
    """A prefix shared by rows. `keys` and `values` hold per layer [G, T, D]; none after a weight update."""

    tokens: list[int]
    keys: list[Tensor] = field(default_factory=list[Tensor])
    values: list[Tensor] = field(default_factory=list[Tensor])
    last_used: int = 0


@dataclass(slots=True, eq=False)
class Row:
    """One line of the cache. `tokens` are those after the trunk."""

    index: int
    trunk: Trunk | None = None
    tokens: list[int] = field(default_factory=list[int])
    last_used: int = 0

    @property
    def offset(self) -> int:
        """Position of the row's first own token."""
        return len(self.trunk.tokens) if self.trunk else 0

    @property
    def length(self) -> int:
        return self.offset + len(self.tokens)

    def history(self) -> list[int]:
        return [*self.trunk.tokens, *self.tokens] if self.trunk else self.tokens


class KeyValueStore:
    """Per layer two tensors [rows, G, capacity, D]; allocated when the first keys arrive, since only then
    are the model's shapes known. `capacity` counts tokens per row. It holds what it is told to and no more:
    its owner bounds rows x capacity."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows = rows
        self.capacity = capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def resize(self, rows: int, capacity: int, keep: Sequence[int]) -> None:
        """Change the shape; row i becomes what row keep[i] was, cut to the new capacity."""
        n = min(capacity, self.capacity)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(rows, old.shape[1], capacity, old.shape[3])
                new[: len(keep), :, :n] = old[list(keep), :, :n]
                tensors[layer] = new
        self.rows, self.capacity = rows, capacity

    def layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The two tensors of a layer, allocated like `key` and `value` [B, G, T, D] on first use."""
        while len(self.keys) <= layer:  # zeros, because what is masked out must still be a number
            self.keys.append(key.new_zeros(self.rows, key.shape[1], self.capacity, key.shape[3]))
            self.values.append(value.new_zeros(self.rows, value.shape[1], self.capacity, value.shape[3]))
        return self.keys[layer], self.values[layer]

    def copy_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` tokens of each source row to the target row beside it."""
        if not sources or not length:
            return
        for tensor in (*self.keys, *self.values):
            tensor[list(targets), :, :length] = tensor[list(sources), :, :length]

    def rebase(self, row: Row, trunk: Trunk) -> None:
        """Make a row whose history starts with the trunk one of its rows."""
        start, length = len(trunk.tokens) - row.offset, len(row.tokens)
        for tensor in (*self.keys, *self.values):
            tensor[row.index, :, : length - start] = tensor[row.index, :, start:length].clone()
        row.trunk, row.tokens = trunk, row.tokens[start:]

    def cut_trunk(self, row: Row, trunk: Trunk) -> None:
        """Give a trunk copies of the keys and values of a row whose history starts with it."""
        own = len(trunk.tokens) - row.offset
        for target, tensors, shared in (
            (trunk.keys, self.keys, row.trunk.keys if row.trunk else []),
            (trunk.values, self.values, row.trunk.values if row.trunk else []),
        ):
            for layer, tensor in enumerate(tensors):
                part = tensor[row.index, :, :own]
                target.append(torch.cat([shared[layer], part], 1) if shared else part.clone())


class RowsView:
    """A forward pass of up to T new tokens for each of B rows: stores their keys and values, and attends to
    the row's trunk and own tokens with one softmax over both.

    `counts` says how many of the T are the row's; what follows is padding, whose traces land one place after
    them and are overwritten before anything can see them. The score of a query against a trunk is computed
    for all rows of that trunk in one product, so the trunk is read once per step. Exact: the same sums as
    attention over each row's whole history.
    """

    def __init__(
        self, store: KeyValueStore, rows: Sequence[Row], counts: Sequence[int], device: torch.device
    ) -> None:
        self._store = store
        self._indices = [row.index for row in rows]
        self._rows = torch.tensor(self._indices, device=device)
        starts = torch.tensor([len(row.tokens) for row in rows], device=device)
        steps = torch.arange(max(counts), device=device).minimum(torch.tensor(counts, device=device)[:, None])
        self._columns = starts[:, None] + steps  # [B, T], where each token goes
        self._seen = max(len(row.tokens) + count for row, count in zip(rows, counts, strict=True))
        visible = torch.arange(self._seen, device=device) <= self._columns[..., None]
        self._hidden = ~visible[:, None, None]  # [B, 1, 1, T, seen]
        offsets = torch.tensor([row.offset for row in rows], device=device)
        self.positions = offsets[:, None] + self._columns
        self._trunks = _by_trunk(rows, device)
        self._trunk_length = max((len(t.tokens) for t, _ in self._trunks), default=0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self._store.layer(layer, key, value)
        keys[self._rows[:, None], :, self._columns] = key.transpose(1, 2).to(keys.dtype)
        values[self._rows[:, None], :, self._columns] = value.transpose(1, 2).to(values.dtype)
        batch, heads, tokens, width = query.shape
        groups = key.shape[1]
        # the queries that share a key head side by side: keys and values are never repeated
        q = (query * scaling).reshape(batch, groups, heads // groups * tokens, width)
        own = self._product(q, keys[:, :, : self._seen].transpose(-1, -2))
        own = own.view(batch, groups, -1, tokens, self._seen).masked_fill(self._hidden, float("-inf"))
        scores = own.view(batch, groups, -1, self._seen)
        if self._trunk_length:
            scores = torch.cat([self._trunk_scores(layer, q), scores], -1)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
        out = self._product(weights[..., self._trunk_length :], values[:, :, : self._seen])
        if self._trunk_length:
            self._add_trunk_values(layer, weights, out)
        return out.view(batch, heads, tokens, -1).transpose(1, 2)

    def _product(self, left: Tensor, cached: Tensor) -> Tensor:
        """left [B, G, Q, x] times each row's part of cached [rows, G, x, y].

        Rows that lie close together are multiplied where they are, holes included; rows far apart are copied.
        """
        last = max(self._indices) + 1
        if self._indices == list(range(last)):
            return left @ cached[:last]
        if last > 2 * len(self._indices):
            return left @ cached[self._rows]
        spread = left.new_zeros(last, *left.shape[1:])
        spread[self._rows] = left
        return (spread @ cached[:last])[self._rows]

    def _trunk_scores(self, layer: int, q: Tensor) -> Tensor:
        trunk, rows = self._trunks[0]
        if rows is None:
            return _by_group(q, trunk.keys[layer].transpose(-1, -2))
        scores = q.new_full((*q.shape[:3], self._trunk_length), float("-inf"))
        for trunk, rows in self._trunks:
            scores[rows, ..., : len(trunk.tokens)] = _by_group(q[rows], trunk.keys[layer].transpose(-1, -2))
        return scores

    def _add_trunk_values(self, layer: int, weights: Tensor, out: Tensor) -> None:
        for trunk, rows in self._trunks:
            part = weights[..., : len(trunk.tokens)]
            if rows is None:
                out += _by_group(part, trunk.values[layer])
            else:
                out[rows] += _by_group(part[rows], trunk.values[layer])


def _by_group(left: Tensor, right: Tensor) -> Tensor:
    """left [B, G, Q, x] times right [G, x, y], all rows of a group in one product."""
    batch, groups, queries, _ = left.shape
    flat = left.transpose(0, 1).reshape(groups, batch * queries, -1) @ right
    return flat.view(groups, batch, queries, -1).transpose(0, 1)


def _by_trunk(rows: Sequence[Row], device: torch.device) -> list[tuple[Trunk, Tensor | None]]:
    """Each trunk with the places of its rows in the batch; None stands for all of them."""
    places: dict[int, list[int]] = {}
    trunks: dict[int, Trunk] = {}
    for place, row in enumerate(rows):
        if row.trunk is not None:
            trunks[id(row.trunk)] = row.trunk
            places.setdefault(id(row.trunk), []).append(place)
    return [
        (trunk, None if len(places[key]) == len(rows) else torch.tensor(places[key], device=device))
        for key, trunk in trunks.items()
    ]
