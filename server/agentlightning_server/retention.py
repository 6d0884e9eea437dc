"""How long stored rollouts are kept: the rule. What is done with it is in `store.retention`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retention:
    """What to let go. None keeps."""

    older_than_ns: int | None = None
    """Final for longer than this."""
    larger_than_bytes: int | None = None
    """The oldest final ones, while the database's rows take more than this."""

    def __bool__(self) -> bool:
        return self.older_than_ns is not None or self.larger_than_bytes is not None
