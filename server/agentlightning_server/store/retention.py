"""What may be forgotten: old rollouts, by age and by size, and never one that is still needed.

Kept, whatever the rule says: rollouts that are queued or running; the last two days' work of a run that is
under way, for it replays them when it goes on from its checkpoint; and live rollouts that live learning has
not used. A rollout goes with its attempts, spans, pieces and keys, in one commit. Keys that expired go too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson
import sqlalchemy as sa

from agentlightning.types import Mode, RolloutStatus

from .schema import attempts, chunks, keys, rollouts, runs, spans
from .sql import Write, chunked

PART = 200  # rollouts in one commit, so that nobody waits long
SMALL_PART = 10  # where more must not go than has to
DAY_NS = 86_400 * 10**9
OPEN_RUN_NS = 14 * DAY_NS  # a run that queued nothing for so long is over
REPLAYED_NS = 2 * DAY_NS  # far more than lies between two checkpoints
ROW_BYTES = 300  # of a row besides its blobs, entries in indexes included
LIVE_RUN = "live"  # id of the run state in which live learning notes how far it has come
_FINAL = [str(status) for status in RolloutStatus if status.final]


def delete_some(write: Write, before_ns: int | None) -> tuple[int, int]:
    """Delete up to a part of the rollouts that may go, oldest first, ended before that time if one is given.

    Returns how many and about how many bytes they took; none are left when that is zero.
    """
    found = _deletable(write, before_ns)
    freed = 0
    for project in {row.project for row in found}:
        ids = [row.id for row in found if row.project == project]
        freed += _measured(write, lambda project=project, ids=ids: _delete(write, project, ids))
    write.connection.execute(keys.delete().where(keys.c.expires_ns < write.now_ns))
    return len(found), freed


def _measured(write: Write, delete: Callable[[], int]) -> int:
    """What deleting frees: SQLite knows its free pages, of PostgreSQL the rows' own size is told."""
    if write.connection.dialect.name != "sqlite":
        return delete()
    before = used_bytes(write.connection)
    delete()
    return before - used_bytes(write.connection)


def _deletable(write: Write, before_ns: int | None) -> Sequence[Any]:
    needed = [*_needed_by_runs(write), *_needed_by_live_learning(write)]
    query = (
        sa.select(rollouts.c.project, rollouts.c.id)
        .where(rollouts.c.status.in_(_FINAL), *(sa.not_(sa.func.coalesce(one, sa.false())) for one in needed))
        .order_by(rollouts.c.seq)
        .limit(SMALL_PART if before_ns is None else PART)
    )
    if before_ns is not None:
        query = query.where(rollouts.c.ended_ns < before_ns)
    return write.connection.execute(query).all()


def _needed_by_runs(write: Write) -> Iterator[sa.ColumnElement[bool]]:
    newest = sa.func.max(rollouts.c.created_ns)
    open_ones = sa.func.sum(sa.case((rollouts.c.status.in_(_FINAL), 0), else_=1))
    query = (
        sa.select(rollouts.c.project, rollouts.c.run_id, newest)
        .where(rollouts.c.run_id.is_not(None))
        .group_by(rollouts.c.project, rollouts.c.run_id)
        .having(sa.or_(newest > write.now_ns - OPEN_RUN_NS, open_ones > 0))
    )
    for project, run_id, newest_ns in write.connection.execute(query):
        yield sa.and_(
            rollouts.c.project == project,
            rollouts.c.run_id == run_id,
            rollouts.c.created_ns >= newest_ns - REPLAYED_NS,
        )


def _needed_by_live_learning(write: Write) -> Iterator[sa.ColumnElement[bool]]:
    """Live rollouts from the last one on that it has done with; that one too, for it goes on after it."""
    query = sa.select(runs.c.project, runs.c.state).where(runs.c.id == LIVE_RUN)
    for project, state in write.connection.execute(query):
        after = orjson.loads(state).get("after")
        last = sa.select(rollouts.c.seq).where(rollouts.c.project == project, rollouts.c.id == after)
        seq = write.connection.scalar(last) or 0
        yield sa.and_(rollouts.c.project == project, rollouts.c.mode == str(Mode.LIVE), rollouts.c.seq >= seq)


def _delete(write: Write, project: str, rollout_ids: Sequence[str]) -> int:
    freed = 0
    for part in chunked(rollout_ids):
        for table in (spans, chunks, keys, attempts):
            of_these = sa.and_(table.c.project == project, table.c.rollout_id.in_(part))
            if table in (spans, chunks):
                freed += write.connection.scalar(sa.select(_bytes_of(table)).where(of_these)) or 0
            write.connection.execute(table.delete().where(of_these))
        write.connection.execute(
            rollouts.delete().where(rollouts.c.project == project, rollouts.c.id.in_(part))
        )
    write.changes.deleted_rollouts |= {(project, rollout_id) for rollout_id in rollout_ids}
    return freed


def used_bytes(connection: sa.Connection) -> int:
    """Bytes that rows take, without what deletions left free. Reads whole tables on PostgreSQL."""
    if connection.dialect.name == "postgresql":
        return sum(int(connection.scalar(sa.select(_bytes_of(table))) or 0) for table in (spans, chunks))
    pages, free, size = (
        connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _bytes_of(table: sa.Table) -> sa.ColumnElement[int]:
    columns = (table.c.head, table.c.body) if table is spans else (table.c.data,)
    lengths = sum((sa.func.length(column) for column in columns), sa.literal(ROW_BYTES))
    return sa.cast(sa.func.sum(lengths), sa.BigInteger)
