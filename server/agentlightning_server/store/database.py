"""Opening a database: a SQLite file, or a PostgreSQL server that several of our servers share.

Not here: the tables (`schema`), what is read and written. Invariants: a database that opens is whole and of
the newest schema; anything else is a StoreError that names it and the remedy, before a row is touched.
On either kind one transaction at a time writes: SQLite's own lock, or an advisory one across all servers. So
the same code is right on both, and what is read inside a write cannot be stale.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from agentlightning.errors import InvalidInput, StoreError

from . import migrations
from .schema import meta, metadata

BUSY_TIMEOUT_MS = 10_000  # another process may be reading the file, such as an export
CHECKED_BYTES = 1 << 30  # a full check of a larger file takes longer than a start should
CHECKPOINT_PAGES = 8000  # of 4 KiB: the same pages, of indexes above all, are written again and again
CACHE_KIB = 32 * 1024
WRITE_LOCK = 0x4147_4C31  # the advisory lock's number in PostgreSQL: "AGL1"
_PG_TIMEOUTS = (
    f"-c lock_timeout={BUSY_TIMEOUT_MS} "
    "-c idle_in_transaction_session_timeout=30000 "  # a server that froze in mid-write lets go of the lock
    "-c statement_timeout=60000"
)


@dataclass(frozen=True, slots=True)
class Database:
    """An open database: an engine for the one writer, and one for the readers."""

    where: str
    """The file or the URL, without its password."""
    writer: sa.Engine
    readers: sa.Engine
    path: Path | None
    """The file of a SQLite database."""

    @property
    def postgres(self) -> bool:
        return self.path is None

    def close(self) -> None:
        """Close all connections."""
        self.writer.dispose()
        self.readers.dispose()


def is_url(where: Path | str) -> bool:
    """Whether it names a server and not a file."""
    return isinstance(where, str) and "://" in where


def open_database(where: Path | str, durability: str = "full") -> Database:
    """Open it, with tables when it is empty, and moved to the newest schema when it is older.

    Raises StoreError, and InvalidInput for a URL that is none of PostgreSQL's.
    """
    database = _postgres(str(where), durability) if is_url(where) else _sqlite(Path(where), durability)
    try:
        _check_file(database)
        with database.writer.begin() as connection:
            _prepare(connection, database.where)
    except (DBAPIError, sqlite3.DatabaseError) as error:
        database.close()
        raise StoreError(_unusable(database, error)) from error
    except StoreError:
        database.close()
        raise
    return database


def _sqlite(path: Path, durability: str) -> Database:
    path.parent.mkdir(parents=True, exist_ok=True)
    synchronous = "FULL" if durability == "full" else "NORMAL"
    url = sa.URL.create("sqlite", database=str(path))
    connect: dict[str, Any] = {
        "timeout": BUSY_TIMEOUT_MS / 1000,
        "isolation_level": None,
        "check_same_thread": False,
    }
    writer = sa.create_engine(url, pool_size=1, max_overflow=0, connect_args=connect)
    readers = sa.create_engine(url, pool_size=8, max_overflow=24, connect_args=connect)
    _on_connect(
        writer,
        f"PRAGMA synchronous={synchronous}",
        f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}",
        f"PRAGMA cache_size=-{CACHE_KIB}",
    )
    _on_connect(readers, "PRAGMA query_only=1")
    # Taking the write lock at BEGIN, so that a write never has to be upgraded from a read that went stale.
    event.listen(writer, "begin", _begin_immediate)
    return Database(str(path), writer, readers, path)


def _postgres(url: str, durability: str) -> Database:
    parsed = postgres_url(url)
    commit = "on" if durability == "full" else "off"
    options = f"{_PG_TIMEOUTS} -c synchronous_commit={commit}"
    connect: dict[str, Any] = {"options": options, "application_name": "agentlightning"}
    try:
        writer = sa.create_engine(parsed, pool_size=1, max_overflow=0, connect_args=connect)
    except ImportError as error:
        raise StoreError("PostgreSQL needs psycopg: install it with pip install '.[postgres]'") from error
    readers = sa.create_engine(parsed, pool_size=8, max_overflow=24, connect_args=connect, pool_pre_ping=True)
    event.listen(writer, "begin", _take_write_lock)
    return Database(parsed.render_as_string(hide_password=True), writer, readers, None)


def postgres_url(url: str) -> sa.URL:
    """SQLAlchemy's URL of a PostgreSQL database. Raises InvalidInput for another kind."""
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError) as error:
        raise InvalidInput(
            "the database's URL cannot be read: postgresql://user:password@host/name"
        ) from error
    if parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise InvalidInput(
            f"a database of kind {parsed.drivername!r} is not known: give the path of a SQLite file, or "
            "postgresql://user:password@host/name"
        )
    return parsed.set(drivername="postgresql+psycopg")


def _on_connect(engine: sa.Engine, *pragmas: str) -> None:
    def configure(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(pragma)
        cursor.close()

    event.listen(engine, "connect", configure)


def _begin_immediate(connection: sa.Connection) -> None:
    # Straight to the driver, since it comes before every commit.
    try:
        connection.connection.cursor().execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        raise OperationalError("BEGIN IMMEDIATE", None, error) from error


def _take_write_lock(connection: sa.Connection) -> None:
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")


def _check_file(database: Database) -> None:
    path = database.path
    if path is None:
        return
    existed = path.exists() and path.stat().st_size > 0
    raw = database.writer.raw_connection()
    try:
        cursor = raw.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA journal_size_limit=67108864")
        if existed and path.stat().st_size < CHECKED_BYTES:
            found = cursor.execute("PRAGMA quick_check(1)").fetchone()
            if found[0] != "ok":
                raise StoreError(_unusable(database, found[0]))
    finally:
        raw.close()


def _prepare(connection: sa.Connection, where: str) -> None:
    step = migrations.revision(connection)
    if step is None:
        metadata.create_all(connection)
        connection.execute(meta.insert().values(key="schema_version", value=str(int(migrations.HEAD))))
        migrations.stamp(connection, migrations.HEAD)
    elif step == "":
        raise StoreError(f"{where} is a database of another program: give --database another one")
    elif step not in migrations.STEPS:
        raise StoreError(
            f"{where} was written by a newer version (schema {step}, this one knows {migrations.HEAD}): "
            "upgrade Agent Lightning, or give --database another one"
        )
    elif step != migrations.HEAD:
        migrations.upgrade(connection)


def _unusable(database: Database, reason: object) -> str:
    cause = " ".join(str(getattr(reason, "orig", None) or reason).split())
    path = database.path
    if path is not None:
        return (
            f"{path} cannot be used as a database ({cause}): restore it from a backup, recover what is "
            f"readable with `sqlite3 {path} .recover`, or move it and its -wal file away to start empty"
        )
    if isinstance(reason, OperationalError):
        return f"{database.where} cannot be reached ({cause}): see to its address, name and password"
    return f"{database.where} cannot be used as a database ({cause})"
