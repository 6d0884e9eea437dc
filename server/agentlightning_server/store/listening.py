"""Hearing what other servers of the same PostgreSQL database committed, by LISTEN and NOTIFY.

Notes are sent inside the writing transaction, so they arrive with its commit or not at all. Invariant: while
this cannot listen, `on_lost` has been called, and nothing that others may revoke is taken from a cache.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from .changes import Changes

CHANNEL = "agentlightning"
POLL_S = 2.0  # between looks at whether to end, should nothing wake it
RECONNECT_S = 1.0
logger = logging.getLogger(__name__)
_notify = sa.text(f"SELECT pg_notify('{CHANNEL}', :note)")


def send(connection: sa.Connection, origin: str, changes: Changes) -> None:
    """Tell the other servers, at the commit of the connection's transaction."""
    for note in changes.notes():
        connection.execute(_notify, {"note": f"{origin} {note}"})


class Listener:
    """A thread with a connection of its own."""

    def __init__(
        self,
        engine: sa.Engine,
        origin: str,
        on_changes: Callable[[Changes], None],
        on_lost: Callable[[], None],
        on_listening: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._origin = origin
        self._on_changes = on_changes
        self._on_lost = on_lost
        self._on_listening = on_listening
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agentlightning-store-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        with suppress(DBAPIError), self._engine.begin() as connection:
            connection.execute(_notify, {"note": f"{self._origin} wakes itself"})
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._listen()
            except Exception as error:
                logger.warning("changes of other servers cannot be heard, trying again: %s", error)
                self._ended.wait(RECONNECT_S)
            finally:
                self._on_lost()

    def _listen(self) -> None:
        import psycopg

        arguments, options = self._engine.dialect.create_connect_args(self._engine.url)
        with psycopg.connect(*arguments, **options, autocommit=True) as connection:
            connection.execute(f"LISTEN {CHANNEL}")  # pyright: ignore[reportArgumentType]
            self._on_listening()
            while not self._ended.is_set():
                self._hear(connection)

    def _hear(self, connection: Any) -> None:
        for notification in connection.notifies(timeout=POLL_S):
            origin, _, note = notification.payload.partition(" ")
            if origin != self._origin:
                self._on_changes(Changes.from_note(note))
            if self._ended.is_set():
                return
