"""One thread that writes, many that ask: group commit.

Every write is a function of a connection. The thread takes all that wait, runs each in one transaction,
commits once, and only then completes their futures. A write that may refuse after it has written runs in a
savepoint of its own.
Invariants: a completed future means a committed write; a write that fails leaves nothing behind and fails
alone; what waits is bounded in number and bytes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from agentlightning.errors import AgentLightningError, StoreError, Unavailable

from .changes import Changes

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Write(Generic[T]):
    run: Callable[[sa.Connection, Changes], T]
    size: int
    refuses: bool
    future: Future[T]


@dataclass(slots=True)
class WriterStatistics:
    """What the writer did so far, for metrics."""

    commits: int = 0
    writes: int = 0
    failures: int = 0
    seconds: float = 0.0
    """Spent in transactions."""


class Writer:
    """The writing thread. `before_commit` runs in it inside each transaction that changed something, and
    `on_commit` after its commit, before the futures complete.
    """

    def __init__(
        self,
        engine: sa.Engine,
        on_commit: Callable[[Changes], None],
        *,
        before_commit: Callable[[sa.Connection, Changes], None] | None = None,
        max_pending: int,
        max_pending_bytes: int,
    ) -> None:
        self._engine = engine
        self._on_commit = on_commit
        self._before_commit = before_commit
        self._max_pending = max_pending
        self._max_pending_bytes = max_pending_bytes
        self._pending: deque[_Write[Any]] = deque()
        self._pending_bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        self.statistics = WriterStatistics()
        self._thread = threading.Thread(target=self._loop, name="agentlightning-store-writer", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def pending(self) -> int:
        return len(self._pending)

    @property
    def pending_bytes(self) -> int:
        return self._pending_bytes

    def submit(
        self,
        run: Callable[[sa.Connection, Changes], T],
        *,
        size: int = 0,
        wait_for_room: bool = False,
        refuses: bool = True,
    ) -> Future[T]:
        """Queue a write. Raises Unavailable when the queue is full (unless told to wait) or closed.

        `refuses` says that it may raise an AgentLightningError after it has written.
        """
        write = _Write(run, size, refuses, Future[T]())
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
        connection: sa.Connection | None = None  # mends itself when the database server was away
        while writes := self._take():
            try:
                connection = connection or self._engine.connect()
                self._commit(connection, writes)
            except Exception as error:
                logger.warning("the store cannot write: %s", error)
                for write in writes:
                    if not write.future.done():
                        write.future.set_exception(_explain(error))
        if connection is not None:
            connection.close()

    def _take(self) -> Sequence[_Write[Any]]:
        """What waits, as soon as something does; nothing once it is closed."""
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
        began = time.perf_counter()
        try:
            with connection.begin():
                outcomes = [_attempt(connection, write, changes) for write in writes]
                if self._before_commit is not None:
                    self._before_commit(connection, changes)
        except Exception as error:
            if len(writes) == 1:
                self.statistics.failures += 1
                writes[0].future.set_exception(_explain(error))
                return
            for write in writes:  # one of them broke the transaction: find it, let the others through
                self._commit(connection, [write])
            return
        self._count(len(writes), time.perf_counter() - began)
        self._tell(changes)
        for write, (result, refusal) in zip(writes, outcomes, strict=True):
            if refusal is None:
                write.future.set_result(result)
            else:
                write.future.set_exception(refusal)

    def _count(self, writes: int, seconds: float) -> None:
        self.statistics.commits += 1
        self.statistics.writes += writes
        self.statistics.seconds += seconds

    def _tell(self, changes: Changes) -> None:
        try:
            self._on_commit(changes)
        except Exception:
            logger.exception("a listener to commits failed; the commit itself stands")


def _attempt(
    connection: sa.Connection, write: _Write[Any], changes: Changes
) -> tuple[Any, AgentLightningError | None]:
    if not write.refuses:
        return write.run(connection, changes), None
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
            f"the database could not be written ({error.orig}): free disk space, mend the file's permissions "
            "or see to the database server, then send again; nothing of this request was stored"
        )
    logger.error("a write to the store failed", exc_info=error)
    return error
