"""Rows of a batch as prefix trees, so that every distinct prefix is computed once.

    plan    = stems, each a prefix shared by its rows, with chunks of what follows it
    chunk   = one forward and backward pass: the rows' tokens after the stem, merged into a tree

Exact: each token sees the same tokens at the same positions as in a row of its own, so log-probabilities and
gradients are those of separate rows up to rounding. A stem is computed once for all its chunks (`scoring`
shows how its gradient is gathered). NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from agentlightning.types import Batch

from .placement import common_prefix

MIN_STEM = 32  # tokens; shorter shared prefixes are merged inside a chunk only


@dataclass(frozen=True, slots=True)
class Chunk:
    """A tree of N tokens after a stem of S, with the E response tokens to be scored.

    Node i has token `tokens[i]` at position `positions[i]`; `visible[i, j]` says whether it sees node j, and
    every node sees the whole stem. Entry e is batch token `entries[e]`, with id `targets[e]`, predicted from
    node `sources[e]`.
    """

    tokens: NDArray[np.int64]  # [N]
    positions: NDArray[np.int64]  # [N]
    visible: NDArray[np.bool_]  # [N, N]
    entries: NDArray[np.int64]  # [E]
    sources: NDArray[np.int64]  # [E]
    targets: NDArray[np.int64]  # [E]


@dataclass(frozen=True, slots=True)
class Stem:
    """A prefix, possibly empty, and the chunks that continue it."""

    tokens: NDArray[np.int64]  # [S]
    chunks: Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class _Row:
    tokens: list[int]
    start: int  # of the row in the batch
    responses: NDArray[np.int64]  # places in the row


def plan(batch: Batch, rows: Sequence[int], budget: int) -> list[Stem]:
    """Pack these rows of a batch into chunks of about `budget` tokens (a longer row is a chunk by itself)."""
    ordered = sorted((_row(batch, r) for r in rows), key=lambda row: row.tokens)
    return [_stem(family, budget) for family in _families(ordered)]


def packed_tokens(stems: Sequence[Stem]) -> int:
    """Tokens that a pass over the plan computes."""
    return sum(len(stem.tokens) + sum(len(chunk.tokens) for chunk in stem.chunks) for stem in stems)


def _row(batch: Batch, index: int) -> _Row:
    start, end = int(batch.row_offsets[index]), int(batch.row_offsets[index + 1])
    responses = np.flatnonzero(batch.response_mask[start:end])
    return _Row(batch.token_ids[start:end].tolist(), start, responses[responses > 0])


def _stem_length(a: _Row, b: _Row) -> int:
    """What two rows can share as a stem: their common prefix, before any token whose logits are needed."""
    firsts = [int(row.responses[0]) - 1 for row in (a, b) if len(row.responses)]
    return min(common_prefix(a.tokens, b.tokens), *firsts) if firsts else 0


def _families(ordered: Sequence[_Row]) -> list[list[_Row]]:
    """Neighbours that share a stem worth computing by itself."""
    families: list[list[_Row]] = []
    for row in ordered:
        if families and _stem_length(families[-1][-1], row) >= MIN_STEM:
            families[-1].append(row)
        else:
            families.append([row])
    return families


def _stem(family: Sequence[_Row], budget: int) -> Stem:
    shared = min((_stem_length(a, b) for a, b in pairwise(family)), default=0)
    chunks: list[list[_Row]] = []
    size = 0
    for i, row in enumerate(family):
        new = len(row.tokens) - (common_prefix(family[i - 1].tokens, row.tokens) if i else shared)
        if not chunks or size + new > budget:
            chunks.append([])
            size, new = 0, len(row.tokens) - shared
        chunks[-1].append(row)
        size += new
    stem = np.array(family[0].tokens[:shared], dtype=np.int64)
    return Stem(stem, [_chunk(rows, shared) for rows in chunks])


def _chunk(rows: Sequence[_Row], shared: int) -> Chunk:
    """Merge sorted rows into a tree: each row reuses the nodes that it shares with the row before it."""
    paths: list[NDArray[np.int64]] = []
    sizes: list[int] = []
    total = 0
    for i, row in enumerate(rows):
        kept = common_prefix(rows[i - 1].tokens, row.tokens) - shared if i else 0
        new = len(row.tokens) - shared - kept
        reused = paths[-1][:kept] if i else np.zeros(0, dtype=np.int64)
        paths.append(np.concatenate([reused, np.arange(total, total + new)]))
        sizes.append(new)
        total += new
    tokens, positions = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    visible = np.zeros((total, total), dtype=np.bool_)
    for row, path, new in zip(rows, paths, sizes, strict=True):
        fresh = path[len(path) - new :]
        tokens[path] = row.tokens[shared:]
        positions[path] = np.arange(shared, len(row.tokens))
        visible[fresh[:, None], path[: len(path) - new]] = True
        visible[fresh[:, None], fresh] = np.tri(new, dtype=np.bool_)
    return Chunk(
        tokens,
        positions,
        visible,
        entries=np.concatenate([row.start + row.responses for row in rows]),
        sources=np.concatenate(
            [path[row.responses - shared - 1] for row, path in zip(rows, paths, strict=True)]
        ),
        targets=np.concatenate([np.array(row.tokens, dtype=np.int64)[row.responses] for row in rows]),
    )
