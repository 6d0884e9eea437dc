"""Writing spans: idempotent, and each one to the rollout it belongs to.

A span without a rollout opens a live one, named after its trace; the same goes for a rollout nobody enqueued.
Not here: reading. Invariants: writing the same span again changes nothing; every stored span has a rollout
and an attempt id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from agentlightning import semconv
from agentlightning.types import (
    Attempt,
    AttemptStatus,
    AttributeValue,
    Limits,
    Mode,
    Reward,
    Rollout,
    RolloutStatus,
    Span,
    SpanKind,
    live_rollout_id,
)

from ..otlp_pb import SpanRow, row_from_span
from .rows import attempt_to_row, rollout_to_row
from .schema import attempts, rollouts, spans
from .writer import Changes

LIVE_WORKER = "live"
LIVE_TIMEOUT_S = 24 * 3600.0  # a live trace whose root never arrives does not stay open for ever
_MAX_VARIABLES = 500  # per statement, far below SQLite's limit

_insert_spans = insert(spans).on_conflict_do_nothing(index_elements=["trace_id", "span_id"])


def attempt_id_of(rollout_id: str, number: int) -> str:
    """The id of the n-th attempt of a rollout."""
    return f"{rollout_id}-{number}"


def write_spans(
    connection: sa.Connection,
    changes: Changes,
    rows: Sequence[SpanRow],
    is_known: Callable[[str], bool],
    now_ns: int,
) -> None:
    """Store the rows that are new. `is_known` says that a rollout exists and is not live."""
    if not rows:
        return
    _assign_rollouts(rows)
    unknown = {cast(str, row["rollout_id"]) for row in rows if not is_known(cast(str, row["rollout_id"]))}
    live = _open_live(connection, changes, unknown, rows, now_ns) if unknown else set[str]()
    _assign_attempts(connection, rows)
    connection.execute(_insert_spans, cast(list[dict[str, Any]], rows))
    if live:
        _close_live(connection, changes, live, rows, now_ns)


def _assign_rollouts(rows: Iterable[SpanRow]) -> None:
    for row in rows:
        if row["rollout_id"] is None:
            row["rollout_id"] = live_rollout_id(row["trace_id"])
            row["attempt_id"] = None


def _open_live(
    connection: sa.Connection, changes: Changes, ids: set[str], rows: Sequence[SpanRow], now_ns: int
) -> set[str]:
    """Those of `ids` that are live rollouts still running, after opening the ones that do not exist."""
    found = {
        row.id: row
        for part in chunks(sorted(ids))
        for row in connection.execute(
            sa.select(rollouts.c.id, rollouts.c.mode, rollouts.c.status).where(rollouts.c.id.in_(part))
        )
    }
    changes.known_rollouts |= {
        i for i, row in found.items() if row.mode != Mode.LIVE or _is_final(row.status)
    }
    missing = ids - found.keys()
    if missing:
        _insert_live(connection, missing, rows, now_ns)
    return missing | (found.keys() - changes.known_rollouts)


def _is_final(status: str) -> bool:
    return RolloutStatus(status).final


def _insert_live(connection: sa.Connection, ids: set[str], rows: Sequence[SpanRow], now_ns: int) -> None:
    started: dict[str, int] = {}
    attempt_ids: dict[str, str] = {}
    for row in rows:
        rollout_id = cast(str, row["rollout_id"])
        if rollout_id in ids:
            start_ns = row["start_ns"] or now_ns
            started[rollout_id] = min(start_ns, started.get(rollout_id, start_ns))
            attempt_ids.setdefault(rollout_id, row["attempt_id"] or attempt_id_of(rollout_id, 1))
    for rollout_id, start_ns in sorted(started.items(), key=lambda item: item[1]):
        live = Rollout(
            rollout_id, None, rollout_id, Mode.LIVE, limits=Limits(LIVE_TIMEOUT_S, 1), created_ns=start_ns
        )
        row = rollout_to_row(live, now_ns) | {"status": str(RolloutStatus.RUNNING), "attempts": 1}
        connection.execute(rollouts.insert(), row)
        deadline_ns = now_ns + int(LIVE_TIMEOUT_S * 1e9)
        attempt = Attempt(
            id=attempt_ids[rollout_id],
            rollout_id=rollout_id,
            number=1,
            worker_id=LIVE_WORKER,
            lease_expires_ns=deadline_ns,  # nobody renews it: the deadline alone ends it
            deadline_ns=deadline_ns,
            started_ns=start_ns,
        )
        connection.execute(insert(attempts).on_conflict_do_nothing(), attempt_to_row(attempt))


def _assign_attempts(connection: sa.Connection, rows: Sequence[SpanRow]) -> None:
    """A span that names only its rollout belongs to the attempt that is under way."""
    lacking = {cast(str, row["rollout_id"]) for row in rows if row["attempt_id"] is None}
    if not lacking:
        return
    latest = {
        row.id: row.attempts
        for part in chunks(sorted(lacking))
        for row in connection.execute(
            sa.select(rollouts.c.id, rollouts.c.attempts).where(rollouts.c.id.in_(part))
        )
    }
    named = _live_attempts(connection, lacking)
    for row in rows:
        if row["attempt_id"] is None:
            rollout_id = cast(str, row["rollout_id"])
            number = max(1, latest.get(rollout_id, 1))
            row["attempt_id"] = named.get(rollout_id) or attempt_id_of(rollout_id, number)


def _live_attempts(connection: sa.Connection, ids: set[str]) -> dict[str, str]:
    """Attempt ids of live rollouts, which may have been named by the client."""
    query = sa.select(attempts.c.rollout_id, attempts.c.id).where(attempts.c.worker_id == LIVE_WORKER)
    return {
        row.rollout_id: row.id
        for part in chunks(sorted(ids))
        for row in connection.execute(query.where(attempts.c.rollout_id.in_(part)))
    }


def _close_live(
    connection: sa.Connection, changes: Changes, live: set[str], rows: Sequence[SpanRow], now_ns: int
) -> None:
    """A span without a parent is the last of its trace: it ends the live rollout."""
    for row in rows:
        rollout_id = cast(str, row["rollout_id"])
        if row["parent_id"] is not None or rollout_id not in live or row["scope"] == semconv.SCOPE_REWARD:
            continue
        live.discard(rollout_id)
        ended_ns = row["end_ns"] or now_ns
        status = RolloutStatus.FAILED if row["failed"] else RolloutStatus.SUCCEEDED
        attempt_status = AttemptStatus.FAILED if row["failed"] else AttemptStatus.SUCCEEDED
        connection.execute(
            rollouts.update().where(rollouts.c.id == rollout_id).values(status=str(status), ended_ns=ended_ns)
        )
        connection.execute(
            attempts.update()
            .where(attempts.c.rollout_id == rollout_id, attempts.c.worker_id == LIVE_WORKER)
            .values(status=str(attempt_status), ended_ns=ended_ns)
        )
        changes.final_rollouts.add(rollout_id)
        changes.known_rollouts.add(rollout_id)


def chunks(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    """Parts that fit into one statement."""
    return (ids[i : i + _MAX_VARIABLES] for i in range(0, len(ids), _MAX_VARIABLES))


def reward_span(rollout_id: str, attempt_id: str, reward: Reward) -> SpanRow:
    """A reward as it is stored: a span whose ids follow from its content, so sending it twice is harmless.

    The trace of a live rollout is the one it is named after; other rewards get a trace of their own, since a
    rollout may span several.
    """
    identity = "\0".join(
        map(str, (rollout_id, attempt_id, reward.name, reward.target, reward.value, reward.time_ns))
    )
    digest = hashlib.sha256(identity.encode()).hexdigest()
    attributes: dict[str, AttributeValue] = {
        semconv.ROLLOUT_ID: rollout_id,
        semconv.ATTEMPT_ID: attempt_id,
        semconv.REWARD_VALUE: float(reward.value),
        semconv.REWARD_NAME: reward.name,
    }
    if reward.target is not None:
        attributes[semconv.REWARD_TARGET] = reward.target
    return row_from_span(
        Span(
            trace_id=_live_trace(rollout_id) or digest[:32],
            span_id=digest[32:48],
            parent_id=None,
            name="reward",
            kind=SpanKind.INTERNAL,
            start_ns=reward.time_ns,
            end_ns=reward.time_ns,
            attributes=attributes,
            scope=semconv.SCOPE_REWARD,
            rollout_id=rollout_id,
            attempt_id=attempt_id,
        )
    )


def _live_trace(rollout_id: str) -> str | None:
    trace_id = rollout_id.removeprefix("live-")
    is_trace = len(trace_id) == 32 and all(c in "0123456789abcdef" for c in trace_id)
    return trace_id if is_trace and live_rollout_id(trace_id) == rollout_id else None
