"""What a store remembers so as not to ask the database again: owners of keys, rollouts, pieces of values.

Shared by all threads. Invariants: a key that was revoked, or whose attempt ended, is forgotten before the
revoking write completes (and, told by another server, as soon as the note arrives); nothing is remembered as
stored before its commit.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

from .changes import Changes, Id
from .keys import Principal

_KNOWN_ROLLOUTS = 200_000  # about 30 MB
_CACHED_KEYS = 20_000
_KNOWN_CHUNKS = 500_000  # hashes of 16 bytes, about 60 MB


class KeyCache:
    """Owners of keys by hash."""

    def __init__(self) -> None:
        self._owners: dict[str, Principal] = {}
        self._generation = 0
        self.enabled = True
        """False while other servers cannot tell of keys they revoked."""

    def get(self, key_hash: str) -> Principal | None:
        """The owner, if it was looked up before."""
        return self._owners.get(key_hash) if self.enabled else None

    def look_up(self, key_hash: str, read: Callable[[], Principal | None]) -> Principal | None:
        """The owner, from the database where need be."""
        generation = self._generation
        found = self.get(key_hash) or read()
        # An attempt that ended while the row was read must not come back to life in the cache.
        if (
            found is not None
            and self.enabled
            and generation == self._generation
            and len(self._owners) < _CACHED_KEYS
        ):
            self._owners[key_hash] = found
        return found

    def forget(self, ended: set[Id], revoked: Iterable[str] = ()) -> None:
        """Drop keys by their attempt or hash."""
        self._generation += 1
        gone = [h for h, owner in list(self._owners.items()) if (owner.project, owner.attempt_id) in ended]
        for key_hash in (*gone, *revoked):
            self._owners.pop(key_hash, None)

    def clear(self) -> None:
        """Forget all."""
        self._generation += 1
        self._owners.clear()


class Known:
    """Rollouts that exist, attempts of live ones, and the pieces of long values that are stored."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rollouts: dict[Id, None] = {}
        self._live: dict[Id, str] = {}
        self._chunks: OrderedDict[Id, set[bytes]] = OrderedDict()
        self._count = 0

    def has_rollout(self, project: str, rollout_id: str) -> bool:
        """Whether it is known to exist, and not to be a live one that is running."""
        return (project, rollout_id) in self._rollouts

    def live_attempt(self, project: str, rollout_id: str) -> str | None:
        """The attempt of a rollout that is known to be live and running."""
        return self._live.get((project, rollout_id))

    def chunks(self, project: str, rollout_id: str) -> set[bytes]:
        """Hashes of the rollout's pieces that are known to be stored; not to be changed."""
        return self._chunks.get((project, rollout_id), _NONE)

    def learn(self, changes: Changes) -> None:
        """Take in what a commit made known or deleted."""
        with self._lock:
            self._learn_rollouts(changes)
            for project, rollout_id, chunk in changes.known_chunks:
                own = self._chunks.setdefault((project, rollout_id), set())
                self._count += chunk not in own
                own.add(chunk)
            for rollout_id in changes.deleted_rollouts:
                self._rollouts.pop(rollout_id, None)
                self._live.pop(rollout_id, None)
                self._count -= len(self._chunks.pop(rollout_id, ()))
            while self._count > _KNOWN_CHUNKS:
                self._count -= len(self._chunks.popitem(last=False)[1])

    def _learn_rollouts(self, changes: Changes) -> None:
        if changes.known_rollouts:
            if len(self._rollouts) > _KNOWN_ROLLOUTS:
                self._rollouts.clear()
            self._rollouts.update(dict.fromkeys(changes.known_rollouts))
        if changes.live_attempts:
            if len(self._live) > _KNOWN_ROLLOUTS:
                self._live.clear()
            self._live.update(changes.live_attempts)
        for rollout_id in changes.final_rollouts:
            self._live.pop(rollout_id, None)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._rollouts.clear()
            self._live.clear()
            self._chunks.clear()
            self._count = 0


_NONE: set[bytes] = set()
