"""Waiting for commits without polling: rollouts that become final, and work that can be claimed.

Futures of `concurrent.futures`, so that threads call `.result()` and coroutines wrap them.
Invariant: subscribe first, look second. A change committed in between completes the future.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress

from .changes import Id


class _Waiter:
    __slots__ = ("future", "remaining")

    def __init__(self, ids: Iterable[Id]) -> None:
        self.remaining = set(ids)
        self.future: Future[None] = Future()
        self.remove(())

    def remove(self, ids: Iterable[Id]) -> None:
        self.remaining.difference_update(ids)
        if not self.remaining:
            complete(self.future)


class FinalRollouts:
    """Who waits for which rollouts to become final."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[Id, set[_Waiter]] = {}

    @contextmanager
    def subscribe(self, ids: Iterable[Id]) -> Generator[_Waiter]:
        """A waiter whose future completes when all of `ids` were announced or removed by the caller."""
        wanted = set(ids)
        waiter = _Waiter(wanted)
        with self._lock:
            for rollout_id in wanted:
                self._waiters.setdefault(rollout_id, set()).add(waiter)
        try:
            yield waiter
        finally:
            with self._lock:
                for rollout_id in wanted:
                    self._discard(rollout_id, waiter)

    def announce(self, ids: Iterable[Id]) -> None:
        """These rollouts are final, committed."""
        with self._lock:
            for rollout_id in ids:
                for waiter in self._waiters.get(rollout_id, ()):
                    waiter.remove((rollout_id,))

    def remove(self, waiter: _Waiter, ids: Iterable[Id]) -> None:
        """The caller found these to be final already."""
        with self._lock:
            waiter.remove(ids)

    def _discard(self, rollout_id: Id, waiter: _Waiter) -> None:
        waiters = self._waiters.get(rollout_id)
        if waiters is not None:
            waiters.discard(waiter)
            if not waiters:
                del self._waiters[rollout_id]


class Signals:
    """Completes the futures of everybody who waits for something of a project."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[str, set[Future[None]]] = {}

    @contextmanager
    def subscribe(self, project: str) -> Generator[Future[None]]:
        """A future that completes at the next `announce`."""
        future: Future[None] = Future()
        with self._lock:
            self._futures.setdefault(project, set()).add(future)
        try:
            yield future
        finally:
            with self._lock:
                self._futures.get(project, set()).discard(future)

    @property
    def waiting(self) -> int:
        """Number of subscribers."""
        with self._lock:
            return sum(map(len, self._futures.values()))

    def announce(self, project: str) -> None:
        """It happened."""
        with self._lock:
            futures = self._futures.pop(project, set())
        for future in futures:
            complete(future)


def complete(future: Future[None]) -> None:
    """Complete it, unless it is complete or its waiter gave up."""
    with suppress(InvalidStateError):
        if not future.done():
            future.set_result(None)
