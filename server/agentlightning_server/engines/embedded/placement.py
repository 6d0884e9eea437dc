"""Which prefixes are worth sharing, and how much of a prompt is already stored. Plain lists, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MIN_TRUNK = 64  # tokens; a shorter shared prefix costs more bookkeeping per step than it saves


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that a and b have in common."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] == b[:low] and a[:high] != b[:high]; slices compare in C
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True, slots=True)
class Sequenced:
    """A token sequence that `weight` requests read, the first `covered` tokens of it from a shared trunk."""

    tokens: list[int]
    weight: int
    covered: int


def worthwhile_prefix(sequences: Sequence[Sequenced]) -> list[int] | None:
    """The prefix whose sharing saves most token reads per step, or None where none is worth it.

    Candidates are the branching points of the sequences' prefix tree. A reader counts when the prefix at
    least doubles what it already shares, so that trunks stay few.
    """
    ordered = sorted(sequences, key=lambda s: s.tokens)
    lengths = [common_prefix(a.tokens, b.tokens) for a, b in pairwise(ordered)]
    candidates = {(len(s.tokens), i) for i, s in enumerate(ordered) if s.weight > 1}
    candidates |= {(length, i) for i, length in enumerate(lengths)}
    best: tuple[int, list[int]] | None = None
    for length, i in candidates:
        saved = _saving(ordered, lengths, length, i) if length >= MIN_TRUNK else 0
        if saved > (best[0] if best else 0):
            best = saved, ordered[i].tokens[:length]
    return best[1] if best else None


def _saving(ordered: Sequence[Sequenced], lengths: Sequence[int], length: int, i: int) -> int:
    """Token reads per step saved by storing the first `length` tokens of ordered[i] once."""
    first = last = i
    while first > 0 and lengths[first - 1] >= length:
        first -= 1
    while last < len(lengths) and lengths[last] >= length:
        last += 1
    gains = [
        (s.weight, s.weight * (length - s.covered))
        for s in ordered[first : last + 1]
        if length - s.covered >= max(MIN_TRUNK, s.covered)
    ]
    readers = sum(weight for weight, _ in gains)
    return sum(gain for _, gain in gains) - length if readers > 1 else 0
