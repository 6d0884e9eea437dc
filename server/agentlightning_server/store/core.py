"""What every operation of the store runs on: one writer, readers, caches, and news of other servers.

Not here: what is written and read (`store`). Invariant: `of` shares all of it, so one database has one writer
in a process, however many projects use it.
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from agentlightning.errors import StoreError

from ..settings import Durability
from . import listening
from .caches import KeyCache, Known
from .changes import Changes
from .database import open_database
from .schema import DEFAULT_PROJECT
from .sql import Read, Write
from .waiting import FinalRollouts, Signals
from .writer import Writer, WriterStatistics

T = TypeVar("T")

MAX_PENDING = 4096  # writes
MAX_PENDING_BYTES = 64 * 1024 * 1024


class StoreCore:
    """An open database. Thread-safe. Close it, or use it as a context manager."""

    def __init__(
        self,
        where: Path | str,
        *,
        durability: Durability = "full",
        max_pending: int = MAX_PENDING,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """`where` is the path of a SQLite file, or a URL of PostgreSQL."""
        self.project = DEFAULT_PROJECT
        self._clock = clock
        self._database = open_database(where, durability)
        self._final = FinalRollouts()
        self._work = Signals()
        self._known = Known()
        self._keys = KeyCache()
        self._origin = uuid.uuid4().hex
        self._listener = self._listen() if self._database.postgres else None
        self._writer = Writer(
            self._database.writer,
            self._committed,
            before_commit=self._tell_others if self._database.postgres else None,
            max_pending=max_pending,
            max_pending_bytes=max_pending_bytes,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits and close the database, for all projects."""
        self._writer.close()
        if self._listener is not None:
            self._listener.close()
        self._database.close()

    def of(self, project: str) -> Self:
        """The same database for another project; nothing of it is seen or changed through this one."""
        if project == self.project:
            return self
        other = copy.copy(self)
        other.project = project
        return other

    @property
    def where(self) -> str:
        """The file, or the URL without its password."""
        return self._database.where

    @property
    def path(self) -> Path | None:
        """The file of a SQLite database."""
        return self._database.path

    @property
    def healthy(self) -> bool:
        """Whether it can still write and read."""
        if not self._writer.alive:
            return False
        try:
            self._read(lambda read: read.connection.exec_driver_sql("SELECT 1"))
        except StoreError:
            return False
        return True

    @property
    def pending(self) -> int:
        """Writes that wait for the writer."""
        return self._writer.pending

    @property
    def pending_bytes(self) -> int:
        """Bytes of the writes that wait for the writer."""
        return self._writer.pending_bytes

    @property
    def statistics(self) -> WriterStatistics:
        """What the writer did so far."""
        return self._writer.statistics

    @contextmanager
    def reading(self) -> Generator[sa.Connection]:
        """A connection for looking at the whole database, whatever the project. Raises StoreError."""
        try:
            with self._database.readers.connect() as connection:
                yield connection
        except DBAPIError as error:
            raise self._unreadable(error) from error

    def vacuum(self) -> None:
        """Give the room of deleted rows back to the disk. Writers wait meanwhile. Raises StoreError."""
        # A reader's connection, for the writer keeps its own, and outside of any transaction, as it must be.
        raw = self._database.readers.raw_connection()
        try:
            cursor = raw.cursor()
            if self._database.postgres:
                cast(Any, raw.driver_connection).autocommit = True
                cursor.execute("SET statement_timeout = 0")
            else:
                cursor.execute("PRAGMA query_only=0")
            cursor.execute("VACUUM")
            if not self._database.postgres:
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except self._database.readers.dialect.loaded_dbapi.Error as error:
            raise StoreError(f"{self.where} could not be made smaller ({error}): free disk space") from error
        finally:
            raw.invalidate()

    # --- plumbing --------------------------------------------------------------------------------

    def _submit(
        self,
        run: Callable[[Write], T],
        *,
        size: int = 200,
        wait_for_room: bool = False,
        refuses: bool = True,
    ) -> Future[T]:
        def write(connection: sa.Connection, changes: Changes) -> T:
            return run(Write(connection, changes, self.project, self._clock()))

        return self._writer.submit(write, size=size, wait_for_room=wait_for_room, refuses=refuses)

    def _read(self, read: Callable[[Read], T]) -> T:
        try:
            with self._database.readers.connect() as connection:
                return read(Read(connection, self.project))
        except DBAPIError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: DBAPIError) -> StoreError:
        return StoreError(
            f"{self.where} could not be read ({error.orig}): check the disk, the file or the database server"
        )

    def _committed(self, changes: Changes) -> None:
        """After each commit, in the writer's thread; and for commits of other servers, in the listener's."""
        self._known.learn(changes)
        if changes.ended_attempts or changes.revoked_keys:
            self._keys.forget(changes.ended_attempts, changes.revoked_keys)
        if changes.final_rollouts:
            self._final.announce(changes.final_rollouts)
        for project in changes.projects_with_work:
            self._work.announce(project)

    # --- other servers of the same database ------------------------------------------------------

    def _tell_others(self, connection: sa.Connection, changes: Changes) -> None:
        listening.send(connection, self._origin, changes)

    def _listen(self) -> listening.Listener:
        self._deaf()
        return listening.Listener(
            self._database.readers, self._origin, self._committed, self._deaf, self._hearing
        )

    def _deaf(self) -> None:
        self._keys.enabled = False
        self._keys.clear()
        self._known.clear()

    def _hearing(self) -> None:
        self._keys.clear()
        self._known.clear()
        self._keys.enabled = True
