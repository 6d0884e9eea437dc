"""What can be asked of the store. Each function is one read on a connection of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa

from agentlightning.errors import NotFound
from agentlightning.types import Attempt, AttemptStatus, Mode, Rollout, RolloutStatus, Span

from ..otlp_pb import span_from_row
from .longvalues import joined_rows
from .queue import check_exist
from .rows import attempt_from_row, rollout_from_row
from .schema import DEFAULT_PROJECT, attempts, chunks, keys, rollouts, runs, spans
from .sql import Read, Write, chunked

FINAL = [str(status) for status in RolloutStatus if status.final]


@dataclass(frozen=True, slots=True)
class RolloutFilter:
    """Which rollouts to list, oldest first; None does not restrict."""

    run_id: str | None = None
    status: RolloutStatus | None = None
    mode: Mode | None = None
    limit: int = 100
    after: str | None = None
    """Id of the last rollout of the page before."""


def rollout(read: Read, rollout_id: str) -> Rollout:
    """One rollout. Raises NotFound."""
    check_exist(read, [rollout_id])
    row = read.connection.execute(_rollouts(read).where(rollouts.c.id == rollout_id)).mappings().one()
    return rollout_from_row(row)


def _rollouts(read: Read) -> sa.Select[Any]:
    return sa.select(rollouts).where(rollouts.c.project == read.project)


def list_rollouts(read: Read, wanted: RolloutFilter) -> list[Rollout]:
    """A page of rollouts in the order they were queued."""
    query = _rollouts(read).order_by(rollouts.c.seq).limit(wanted.limit)
    if wanted.run_id is not None:
        query = query.where(rollouts.c.run_id == wanted.run_id)
    if wanted.status is not None:
        query = query.where(rollouts.c.status == str(wanted.status))
    if wanted.mode is not None:
        query = query.where(rollouts.c.mode == str(wanted.mode))
    if wanted.after is not None:
        check_exist(read, [wanted.after])
        last = sa.select(rollouts.c.seq).where(
            rollouts.c.project == read.project, rollouts.c.id == wanted.after
        )
        query = query.where(rollouts.c.seq > last.scalar_subquery())
    return [rollout_from_row(row) for row in read.connection.execute(query).mappings()]


def final_rollouts(read: Read, rollout_ids: Sequence[str]) -> list[Rollout]:
    """Those of the rollouts that are final, in the order given. Raises NotFound for an unknown id."""
    check_exist(read, rollout_ids)
    found = {
        row["id"]: rollout_from_row(row)
        for part in chunked(rollout_ids)
        for row in read.connection.execute(
            _rollouts(read).where(rollouts.c.id.in_(part), rollouts.c.status.in_(FINAL))
        ).mappings()
    }
    return [found[rollout_id] for rollout_id in dict.fromkeys(rollout_ids) if rollout_id in found]


def list_attempts(read: Read | Write, rollout_id: str) -> list[Attempt]:
    """The attempts of a rollout, first to last. Raises NotFound."""
    check_exist(read, [rollout_id])
    query = (
        sa.select(attempts)
        .where(attempts.c.project == read.project, attempts.c.rollout_id == rollout_id)
        .order_by(attempts.c.number)
    )
    return [attempt_from_row(row) for row in read.connection.execute(query).mappings()]


def attempt(read: Read, attempt_id: str) -> Attempt:
    """One attempt. Raises NotFound."""
    query = sa.select(attempts).where(attempts.c.project == read.project, attempts.c.id == attempt_id)
    row = read.connection.execute(query).mappings().first()
    if row is None:
        raise NotFound(f"there is no attempt {attempt_id!r:.300}")
    return attempt_from_row(row)


def list_spans(read: Read, rollout_id: str, attempt_id: str | None) -> list[Span]:
    """Spans of one attempt by start time; without an id, of the one that decides. Raises NotFound."""
    known = list_attempts(read, rollout_id)
    if attempt_id is None:
        if not known:
            return []
        attempt_id = deciding(known).id
    query = (
        sa.select(spans.c.rollout_id, spans.c.attempt_id, spans.c.head, spans.c.body, spans.c.parts)
        .where(
            spans.c.project == read.project,
            spans.c.rollout_id == rollout_id,
            spans.c.attempt_id == attempt_id,
        )
        .order_by(spans.c.start_ns, spans.c.seq)
    )
    rows = [dict(row) for row in read.connection.execute(query).mappings()]
    return [span_from_row(row) for row in joined_rows(rows, lambda: _pieces(read, rollout_id))]


def _pieces(read: Read, rollout_id: str) -> dict[bytes, tuple[bytes | None, bytes]]:
    query = sa.select(chunks.c.hash, chunks.c.parent, chunks.c.data).where(
        chunks.c.project == read.project, chunks.c.rollout_id == rollout_id
    )
    return {row.hash: (row.parent, row.data) for row in read.connection.execute(query)}


def deciding(known: Sequence[Attempt]) -> Attempt:
    """The attempt that counts: the one that succeeded, else the latest."""
    for one in known:
        if one.status is AttemptStatus.SUCCEEDED:
            return one
    return known[-1]


def run_state(read: Read, run_id: str) -> Any:
    """What the training loop stored of a run; None when there is no such run."""
    query = sa.select(runs.c.state).where(runs.c.project == read.project, runs.c.id == run_id)
    state = read.connection.scalar(query)
    return None if state is None else orjson.loads(state)


def run_ids(read: Read) -> list[str]:
    """Ids of the runs, oldest first."""
    query = sa.select(runs.c.id).where(runs.c.project == read.project).order_by(runs.c.created_ns)
    return list(read.connection.scalars(query))


def counts(read: Read) -> dict[str, int]:
    """Number of rollouts by status."""
    query = sa.select(rollouts.c.status, sa.func.count()).where(rollouts.c.project == read.project)
    return {row[0]: row[1] for row in read.connection.execute(query.group_by(rollouts.c.status))}


def projects(connection: sa.Connection) -> list[str]:
    """Names of the projects that have rollouts or keys."""
    query = sa.union(sa.select(rollouts.c.project), sa.select(keys.c.project))
    return sorted({*connection.scalars(query), DEFAULT_PROJECT})
