"""What a committed group of writes changed that somebody may be waiting for or may have cached.

Ids stand with their project, as `(project, id)`. Travels as JSON between servers that share a database.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import orjson

Id = tuple[str, str]
"""(project, id)"""

_NOTE_BYTES = 7000  # PostgreSQL takes notes of less than 8000
_IDS_A_NOTE = 40  # of up to 60 characters or so; longer ones get notes of their own


@dataclass(slots=True)
class Changes:
    """The sets grow while writes run; nothing is told before the commit."""

    final_rollouts: set[Id] = field(default_factory=set[Id])
    ended_attempts: set[Id] = field(default_factory=set[Id])
    known_rollouts: set[Id] = field(default_factory=set[Id])
    """Seen to exist, so that spans need not look them up again."""
    live_attempts: dict[Id, str] = field(default_factory=dict[Id, str])
    """Attempts of live rollouts that are running, so that spans need not look them up again."""
    known_chunks: set[tuple[str, str, bytes]] = field(default_factory=set[tuple[str, str, bytes]])
    """(project, rollout id, hash) of pieces that are stored now."""
    deleted_rollouts: set[Id] = field(default_factory=set[Id])
    revoked_keys: set[str] = field(default_factory=set[str])
    """Hashes."""
    projects_with_work: set[str] = field(default_factory=set[str])
    """Some rollout became claimable, now or after its retry delay."""

    def add(self, other: Changes) -> None:
        """Take in the changes of another write."""
        for one in fields(self):
            getattr(self, one.name).update(getattr(other, one.name))

    # --- between servers -------------------------------------------------------------------------

    def notes(self) -> Iterator[str]:
        """JSON texts, each short enough for a notification; none when other servers need not know."""
        parts: dict[str, list[Any]] = {
            "final": sorted(self.final_rollouts),
            "ended": sorted(self.ended_attempts),
            "deleted": sorted(self.deleted_rollouts),
            "revoked": sorted(self.revoked_keys),
            "work": sorted(self.projects_with_work),
        }
        for name, items in parts.items():
            for start in range(0, len(items), _IDS_A_NOTE):
                yield from _fitting(name, items[start : start + _IDS_A_NOTE])

    @classmethod
    def from_note(cls, note: str) -> Changes:
        """The changes that a note tells of; none for one that cannot be read."""
        changes = cls()
        try:
            told: dict[str, list[Any]] = orjson.loads(note)
            changes.final_rollouts = {(p, i) for p, i in told.get("final", ())}
            changes.ended_attempts = {(p, i) for p, i in told.get("ended", ())}
            changes.deleted_rollouts = {(p, i) for p, i in told.get("deleted", ())}
            changes.revoked_keys = set(told.get("revoked", ()))
            changes.projects_with_work = set(told.get("work", ()))
        except (ValueError, TypeError, AttributeError):
            return cls()
        return changes


def _fitting(name: str, items: list[Any]) -> Iterator[str]:
    note = orjson.dumps({name: items})
    if len(note) <= _NOTE_BYTES or len(items) == 1:
        yield note.decode()
        return
    half = len(items) // 2
    yield from _fitting(name, items[:half])
    yield from _fitting(name, items[half:])
