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
from .queue import check_exist
from .rows import attempt_from_row, rollout_from_row
from .schema import attempts, rollouts, runs, spans
from .spans import chunks

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


def rollout(connection: sa.Connection, rollout_id: str) -> Rollout:
    """One rollout. Raises NotFound."""
    check_exist(connection, [rollout_id])
    row = connection.execute(sa.select(rollouts).where(rollouts.c.id == rollout_id)).mappings().one()
    return rollout_from_row(row)


def list_rollouts(connection: sa.Connection, wanted: RolloutFilter) -> list[Rollout]:
    """A page of rollouts in the order they were queued."""
    query = sa.select(rollouts).order_by(rollouts.c.seq).limit(wanted.limit)
    if wanted.run_id is not None:
        query = query.where(rollouts.c.run_id == wanted.run_id)
    if wanted.status is not None:
        query = query.where(rollouts.c.status == wanted.status)
    if wanted.mode is not None:
        query = query.where(rollouts.c.mode == wanted.mode)
    if wanted.after is not None:
        check_exist(connection, [wanted.after])
        last = sa.select(rollouts.c.seq).where(rollouts.c.id == wanted.after).scalar_subquery()
        query = query.where(rollouts.c.seq > last)
    return [rollout_from_row(row) for row in connection.execute(query).mappings()]


def final_rollouts(connection: sa.Connection, rollout_ids: Sequence[str]) -> list[Rollout]:
    """Those of the rollouts that are final, in the order given. Raises NotFound for an unknown id."""
    check_exist(connection, rollout_ids)
    found = {
        row["id"]: rollout_from_row(row)
        for part in chunks(rollout_ids)
        for row in connection.execute(
            sa.select(rollouts).where(rollouts.c.id.in_(part), rollouts.c.status.in_(FINAL))
        ).mappings()
    }
    return [found[rollout_id] for rollout_id in dict.fromkeys(rollout_ids) if rollout_id in found]


def list_attempts(connection: sa.Connection, rollout_id: str) -> list[Attempt]:
    """The attempts of a rollout, first to last. Raises NotFound."""
    check_exist(connection, [rollout_id])
    query = sa.select(attempts).where(attempts.c.rollout_id == rollout_id).order_by(attempts.c.number)
    return [attempt_from_row(row) for row in connection.execute(query).mappings()]


def attempt(connection: sa.Connection, attempt_id: str) -> Attempt:
    """One attempt. Raises NotFound."""
    row = connection.execute(sa.select(attempts).where(attempts.c.id == attempt_id)).mappings().first()
    if row is None:
        raise NotFound(f"there is no attempt {attempt_id!r:.300}")
    return attempt_from_row(row)


def list_spans(connection: sa.Connection, rollout_id: str, attempt_id: str | None) -> list[Span]:
    """Spans of one attempt by start time; without an id, of the one that decides. Raises NotFound."""
    known = list_attempts(connection, rollout_id)
    if attempt_id is None:
        if not known:
            return []
        attempt_id = deciding(known).id
    query = (
        sa.select(spans.c.rollout_id, spans.c.attempt_id, spans.c.head, spans.c.body)
        .where(spans.c.rollout_id == rollout_id, spans.c.attempt_id == attempt_id)
        .order_by(spans.c.start_ns, spans.c.seq)
    )
    return [span_from_row(dict(row)) for row in connection.execute(query).mappings()]


def deciding(known: Sequence[Attempt]) -> Attempt:
    """The attempt that counts: the one that succeeded, else the latest."""
    for one in known:
        if one.status is AttemptStatus.SUCCEEDED:
            return one
    return known[-1]


def run_state(connection: sa.Connection, run_id: str) -> Any:
    """What the training loop stored of a run; None when there is no such run."""
    state = connection.scalar(sa.select(runs.c.state).where(runs.c.id == run_id))
    return None if state is None else orjson.loads(state)


def run_ids(connection: sa.Connection) -> list[str]:
    """Ids of the runs, oldest first."""
    return list(connection.scalars(sa.select(runs.c.id).order_by(runs.c.created_ns)))


def counts(connection: sa.Connection) -> dict[str, int]:
    """Number of rollouts by status."""
    query = sa.select(rollouts.c.status, sa.func.count()).group_by(rollouts.c.status)
    return {row[0]: row[1] for row in connection.execute(query)}
