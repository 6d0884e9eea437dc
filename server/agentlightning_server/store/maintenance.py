"""Looking for damage, and giving room back: what `agl store` does to a whole database.

Nothing is repaired here: what is found is told, with its number. Servers may be running meanwhile; SQLite's
rewrite makes them wait.
"""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from agentlightning.types import AttemptStatus, RolloutStatus

from .longvalues import last_hashes
from .schema import attempts, chunks, rollouts, spans
from .store import Store

PAGE = 1000  # spans looked at at a time


def problems(store: Store) -> list[str]:
    """A sentence for each kind of damage."""
    with store.reading() as connection:
        return [*_broken_pages(connection), *_lost_relations(connection), *_lost_pieces(connection)]


def _broken_pages(connection: sa.Connection) -> Iterator[str]:
    if connection.dialect.name == "sqlite":
        for row in connection.exec_driver_sql("PRAGMA integrity_check(20)"):
            if row[0] != "ok":
                yield f"damaged: {row[0]}; restore a backup, or recover what is readable (sqlite3 .recover)"


def _lost_relations(connection: sa.Connection) -> Iterator[str]:
    for table, name in ((spans, "spans"), (attempts, "attempts"), (chunks, "pieces of long values")):
        owner = sa.exists().where(rollouts.c.project == table.c.project, rollouts.c.id == table.c.rollout_id)
        if count := connection.scalar(sa.select(sa.func.count()).select_from(table).where(~owner)):
            yield f"{count} {name} belong to a rollout that is not there"
    under_way = sa.exists().where(
        attempts.c.project == rollouts.c.project,
        attempts.c.rollout_id == rollouts.c.id,
        attempts.c.status == str(AttemptStatus.RUNNING),
    )
    stuck = sa.select(sa.func.count()).select_from(rollouts)
    stuck = stuck.where(rollouts.c.status == str(RolloutStatus.RUNNING), ~under_way)
    if count := connection.scalar(stuck):
        yield f"{count} rollouts are running without an attempt that does"


def _lost_pieces(connection: sa.Connection) -> Iterator[str]:
    missing = 0
    last = 0
    query = sa.select(spans.c.seq, spans.c.project, spans.c.rollout_id, spans.c.parts).order_by(spans.c.seq)
    while page := connection.execute(
        query.where(spans.c.seq > last, spans.c.parts.is_not(None)).limit(PAGE)
    ).all():
        last = page[-1].seq
        for row in page:
            wanted = set(last_hashes(row.parts))
            of_rollout = sa.and_(chunks.c.project == row.project, chunks.c.rollout_id == row.rollout_id)
            found = connection.scalar(
                sa.select(sa.func.count()).select_from(chunks).where(of_rollout, chunks.c.hash.in_(wanted))
            )
            missing += found != len(wanted)
    child = chunks.alias()
    parent = sa.exists().where(
        chunks.c.project == child.c.project,
        chunks.c.rollout_id == child.c.rollout_id,
        chunks.c.hash == child.c.parent,
    )
    broken = sa.select(sa.func.count()).select_from(child).where(child.c.parent.is_not(None), ~parent)
    missing += connection.scalar(broken) or 0
    if missing:
        yield f"{missing} long values have lost a piece: their spans cannot be read; restore a backup"


def rewrite(store: Store) -> tuple[int, int]:
    """Give the room of deleted rows back; bytes on disk before and after."""
    before = size_on_disk(store)
    store.vacuum()
    return before, size_on_disk(store)


def size_on_disk(store: Store) -> int:
    """Bytes of the database's files."""
    if store.path is not None:
        files = (store.path, store.path.with_name(store.path.name + "-wal"))
        return sum(path.stat().st_size for path in files if path.exists())
    with store.reading() as connection:
        return int(connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one())
