"""The tables, and opening the database file that holds them.

Not here: what is read and written. Invariant: a database that opens is whole and of this schema; anything
else is a StoreError that names the file and the remedy, before a single row is touched.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import ConnectionPoolEntry

from agentlightning.errors import StoreError

SCHEMA_VERSION = 1
BUSY_TIMEOUT_MS = 10_000  # another process may be reading the file, such as an export
CHECKED_BYTES = 1 << 30  # a full check of a larger file takes longer than a start should

metadata = sa.MetaData()

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

rollouts = sa.Table(
    "rollouts",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),  # order of the queue and of listings
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("run_id", sa.Text),
    sa.Column("group_id", sa.Text, nullable=False),
    sa.Column("mode", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("policy_version", sa.Integer),
    sa.Column("task", sa.LargeBinary),  # JSON
    sa.Column("start_to_close_s", sa.Float, nullable=False),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),  # made so far
    sa.Column("failures", sa.Integer, nullable=False),  # of those, the ones that count against max_attempts
    sa.Column("available_ns", sa.BigInteger, nullable=False),  # not claimed before, for the retry delay
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("ended_ns", sa.BigInteger),
    sa.Index("rollouts_by_status", "status", "seq"),
    sa.Index("rollouts_by_run", "run_id", "seq"),
    sqlite_autoincrement=True,
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("rollout_id", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("worker_id", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("lease_expires_ns", sa.BigInteger, nullable=False),
    sa.Column("deadline_ns", sa.BigInteger, nullable=False),
    sa.Column("started_ns", sa.BigInteger, nullable=False),
    sa.Column("ended_ns", sa.BigInteger),
    sa.Column("error", sa.Text),
    sa.Index("attempts_by_rollout", "rollout_id", "number", unique=True),
    sa.Index("attempts_running", "status", "lease_expires_ns"),
)

spans = sa.Table(
    "spans",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("trace_id", sa.Text, nullable=False),
    sa.Column("span_id", sa.Text, nullable=False),
    sa.Column("parent_id", sa.Text),
    sa.Column("rollout_id", sa.Text, nullable=False),
    sa.Column("attempt_id", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("start_ns", sa.BigInteger, nullable=False),
    sa.Column("end_ns", sa.BigInteger, nullable=False),
    sa.Column("failed", sa.Boolean, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),  # protobuf: ResourceSpans without spans
    sa.Column("body", sa.LargeBinary, nullable=False),  # protobuf: Span
    sa.Index("spans_by_id", "trace_id", "span_id", unique=True),
    sa.Index("spans_by_attempt", "rollout_id", "attempt_id", "start_ns"),
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("hash", sa.Text, primary_key=True),  # SHA-256, hex
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("rollout_id", sa.Text),
    sa.Column("attempt_id", sa.Text),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Index("keys_by_attempt", "attempt_id"),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("state", sa.LargeBinary, nullable=False),  # JSON
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("updated_ns", sa.BigInteger, nullable=False),
)


def open_engines(path: Path, durability: str) -> tuple[sa.Engine, sa.Engine]:
    """Engines for the one writer and for the readers. Creates the file and the tables when they are missing.

    Raises StoreError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    synchronous = "FULL" if durability == "full" else "NORMAL"
    url = sa.URL.create("sqlite", database=str(path))
    writer = sa.create_engine(url, pool_size=1, max_overflow=0, connect_args=_CONNECT)
    readers = sa.create_engine(url, pool_size=8, max_overflow=24, connect_args=_CONNECT)
    _on_connect(writer, f"PRAGMA synchronous={synchronous}")
    _on_connect(readers, "PRAGMA query_only=1")
    # Taking the write lock at BEGIN, so that a write never has to be upgraded from a read that went stale.
    event.listen(writer, "begin", _begin_immediate)
    try:
        _prepare(writer, path)
    except (DatabaseError, sqlite3.DatabaseError) as error:
        writer.dispose()
        raise StoreError(_unusable(path, error)) from error
    except StoreError:
        writer.dispose()
        raise
    return writer, readers


_CONNECT: dict[str, Any] = {
    "timeout": BUSY_TIMEOUT_MS / 1000,
    "isolation_level": None,
    "check_same_thread": False,
}


def _on_connect(engine: sa.Engine, *pragmas: str) -> None:
    def configure(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(pragma)
        cursor.close()

    event.listen(engine, "connect", configure)


def _begin_immediate(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _prepare(engine: sa.Engine, path: Path) -> None:
    existed = path.exists() and path.stat().st_size > 0
    raw = engine.raw_connection()
    try:
        cursor = raw.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA journal_size_limit=67108864")
        if existed and path.stat().st_size < CHECKED_BYTES:
            found = cursor.execute("PRAGMA quick_check(1)").fetchone()
            if found[0] != "ok":
                raise StoreError(_unusable(path, found[0]))
    finally:
        raw.close()
    with engine.begin() as connection:
        _check_version(connection, path)
        metadata.create_all(connection)
        if connection.scalar(sa.select(meta.c.value).where(meta.c.key == "schema_version")) is None:
            connection.execute(meta.insert().values(key="schema_version", value=str(SCHEMA_VERSION)))


def _check_version(connection: sa.Connection, path: Path) -> None:
    tables = sa.inspect(connection).get_table_names()
    if not tables:
        return
    if "meta" not in tables:
        raise StoreError(f"{path} is a database of another program: give --database another path")
    found = connection.scalar(sa.select(meta.c.value).where(meta.c.key == "schema_version"))
    if found is not None and int(found) > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer version (schema {found}, this one knows {SCHEMA_VERSION}): "
            "upgrade Agent Lightning, or give --database another path"
        )


def _unusable(path: Path, reason: object) -> str:
    cause = " ".join(str(reason).split())
    return (
        f"{path} cannot be used as a database ({cause}): restore it from a backup, recover what is readable "
        f"with `sqlite3 {path} .recover`, or move it and its -wal file away to start empty"
    )
