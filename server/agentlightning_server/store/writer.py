"""One thread that writes, many that ask: group commit.

Every write is a function of a connection. The thread takes all that wait, runs each in a savepoint of one
transaction, commits once, and only then completes their futures.
Invariants: a completed future means a committed write; a write that fails leaves nothing behind and fails
alone; what waits is bounded in number and bytes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from agentlightning.errors import AgentLightningError, StoreError, Unavailable

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Changes:
    """What a committed group of writes changed that somebody may be waiting for or may have cached."""

    final_rollouts: set[str] = field(default_factory=set[str])
    ended_attempts: set[str] = field(default_factory=set[str])
    known_rollouts: set[str] = field(default_factory=set[str])
    """Seen to exist, so that spans need not look them up again."""
    work: bool = False
    """Some rollout became claimable, now or after its retry delay."""
    keys: bool = False

    def add(self, other: Changes) -> None:
        self.final_rollouts |= other.final_rollouts
        self.ended_attempts |= other.ended_attempts
        self.known_rollouts |= other.known_rollouts
        self.work |= other.work
        self.keys |= other.keys


@dataclass(slots=True)
class _Write(Generic[T]):
    run: Callable[[sa.Connection, Changes], T]
    size: int
    future: Future[T]


class Writer:
    """The writing thread. `on_commit` runs in it after each commit, before the futures complete."""

    def __init__(
        self,
        engine: sa.Engine,
        on_commit: Callable[[Changes], None],
        *,
        max_pending: int,
        max_pending_bytes: int,
    ) -> None:
        self._engine = engine
        self._on_commit = on_commit
        self._max_pending = max_pending
        self._max_pending_bytes = max_pending_bytes
        self._pending: deque[_Write[Any]] = deque()
        self._pending_bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="agentlightning-store-writer", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def pending(self) -> int:
        return len(self._pending)

    def submit(
        self, run: Callable[[sa.Connection, Changes], T], *, size: int = 0, wait_for_room: bool = False
    ) -> Future[T]:
        """Queue a write. Raises Unavailable when the queue is full (unless told to wait) or closed."""
        write = _Write(run, size, Future[T]())
        with self._changed:
            while not self._closed and not self._has_room(size):
                if not wait_for_room:
                    raise Unavailable("the store has more to write than it may hold; send again in a moment")
                self._changed.wait()
            if self._closed:
                raise Unavailable("the store is closed; the server is shutting down")
            self._pending.append(write)
            self._pending_bytes += size
            self._changed.notify_all()
        return write.future

    def close(self) -> None:
        """Write what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _has_room(self, size: int) -> bool:
        # A single write larger than the bound must still get through once it is alone.
        fits = self._pending_bytes + size <= self._max_pending_bytes or not self._pending
        return fits and len(self._pending) < self._max_pending

    def _loop(self) -> None:
        with self._engine.connect() as connection:
            while writes := self._take():
                self._commit(connection, writes)

    def _take(self) -> Sequence[_Write[Any]]:
        with self._changed:
            while not self._pending and not self._closed:
                self._changed.wait()
            writes = list(self._pending)
            self._pending.clear()
            self._pending_bytes = 0
            self._changed.notify_all()
        return [write for write in writes if write.future.set_running_or_notify_cancel()] or (
            self._take() if writes else []
        )

    def _commit(self, connection: sa.Connection, writes: Sequence[_Write[Any]]) -> None:
        changes = Changes()
        try:
            with connection.begin():
                outcomes = [_attempt(connection, write, changes) for write in writes]
        except Exception as error:
            if len(writes) == 1:
                writes[0].future.set_exception(_explain(error))
                return
            for write in writes:  # one of them broke the transaction: find it, let the others through
                self._commit(connection, [write])
            return
        self._tell(changes)
        for write, (result, refusal) in zip(writes, outcomes, strict=True):
            if refusal is None:
                write.future.set_result(result)
            else:
                write.future.set_exception(refusal)

    def _tell(self, changes: Changes) -> None:
        try:
            self._on_commit(changes)
        except Exception:
            logger.exception("a listener to commits failed; the commit itself stands")


def _attempt(
    connection: sa.Connection, write: _Write[Any], changes: Changes
) -> tuple[Any, AgentLightningError | None]:
    own = Changes()
    # Straight to the driver: through SQLAlchemy these would cost as much as the write itself.
    cursor = connection.connection.cursor()
    cursor.execute("SAVEPOINT one")
    try:
        result = write.run(connection, own)
    except AgentLightningError as refusal:
        cursor.execute("ROLLBACK TO one")
        cursor.execute("RELEASE one")
        return None, refusal
    cursor.execute("RELEASE one")
    changes.add(own)
    return result, None


def _explain(error: Exception) -> Exception:
    if isinstance(error, DBAPIError):
        return StoreError(
            f"the database could not be written ({error.orig}): free disk space or mend the file's "
            "permissions, then send again; nothing of this request was stored"
        )
    logger.error("a write to the store failed", exc_info=error)
    return error
