"""Writing spans: idempotent, and each one to the rollout it belongs to.

A span without a rollout opens a live one, named after its trace; the same goes for a rollout nobody enqueued.
Not here: reading. Invariants: writing the same span again changes nothing; every stored span has a rollout
and an attempt id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import sqlalchemy as sa

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
from .caches import Known
from .longvalues import cut
from .rows import attempt_to_row, rollout_to_row
from .schema import attempts, chunks, rollouts, spans
from .sql import FastInsert, InsertNew, Write, chunked

LIVE_WORKER = "live"
LIVE_TIMEOUT_S = 24 * 3600.0  # a live trace whose root never arrives does not stay open for ever

_insert_spans = FastInsert(spans, [column.name for column in spans.columns if column.name != "seq"])
_insert_chunks = FastInsert(chunks, [column.name for column in chunks.columns])
_insert_rollout = InsertNew(rollouts)
_insert_attempt = InsertNew(attempts)


def attempt_id_of(rollout_id: str, number: int) -> str:
    """The id of the n-th attempt of a rollout."""
    return f"{rollout_id}-{number}"


def write_spans(write: Write, rows: Sequence[SpanRow], known: Known) -> None:
    """Store the rows that are new."""
    if not rows:
        return
    _assign_rollouts(rows)
    ids = {cast(str, row["rollout_id"]) for row in rows}
    live = {i: attempt for i in ids if (attempt := known.live_attempt(write.project, i))}
    unknown = {i for i in ids if i not in live and not known.has_rollout(write.project, i)}
    if unknown:
        live |= _open_live(write, unknown, rows)
    _assign_attempts(write, rows, live)
    _insert(write, rows, known)
    if live:
        _close_live(write, set(live), rows)


def _insert(write: Write, rows: Sequence[SpanRow], known: Known) -> None:
    """The spans, after those pieces of their long values that are not stored yet."""
    stored: list[dict[str, Any]] = []
    pieces: list[dict[str, Any]] = []
    for row in rows:
        body, parts, found = cut(row["body"])
        stored.append({**row, "project": write.project, "body": body, "parts": parts})
        if found:
            rollout_id = cast(str, row["rollout_id"])
            have = known.chunks(write.project, rollout_id)
            owner = {"project": write.project, "rollout_id": rollout_id}
            new = [piece for piece in found if piece.hash not in have]
            pieces += [{**owner, "hash": p.hash, "parent": p.parent, "data": p.data} for p in new]
            write.changes.known_chunks |= {(write.project, rollout_id, p.hash) for p in new}
    _insert_chunks(write.connection, pieces)
    _insert_spans(write.connection, stored)


def _assign_rollouts(rows: Iterable[SpanRow]) -> None:
    for row in rows:
        if row["rollout_id"] is None:
            row["rollout_id"] = live_rollout_id(row["trace_id"])
            row["attempt_id"] = None


def _open_live(write: Write, ids: set[str], rows: Sequence[SpanRow]) -> dict[str, str]:
    """Attempts of those of `ids` that are live and running, after opening the rollouts that do not exist."""
    query = sa.select(rollouts.c.id, rollouts.c.mode, rollouts.c.status)
    found = {
        row.id: row
        for part in chunked(sorted(ids))
        for row in write.connection.execute(
            query.where(rollouts.c.project == write.project, rollouts.c.id.in_(part))
        )
    }
    settled = {i for i, row in found.items() if row.mode != Mode.LIVE or _is_final(row.status)}
    write.changes.known_rollouts |= {(write.project, rollout_id) for rollout_id in settled}
    missing = ids - found.keys()
    live = _insert_live(write, missing, rows) if missing else {}
    if running := found.keys() - settled:
        live |= _live_attempts(write, running)
    write.changes.live_attempts.update({(write.project, i): attempt for i, attempt in live.items()})
    return live


def _is_final(status: str) -> bool:
    return RolloutStatus(status).final


def _insert_live(write: Write, ids: set[str], rows: Sequence[SpanRow]) -> dict[str, str]:
    started: dict[str, int] = {}
    attempt_ids: dict[str, str] = {}
    for row in rows:
        rollout_id = cast(str, row["rollout_id"])
        if rollout_id in ids:
            start_ns = row["start_ns"] or write.now_ns
            started[rollout_id] = min(start_ns, started.get(rollout_id, start_ns))
            attempt_ids.setdefault(rollout_id, row["attempt_id"] or attempt_id_of(rollout_id, 1))
    for rollout_id, start_ns in sorted(started.items(), key=lambda item: item[1]):
        live = Rollout(
            rollout_id, None, rollout_id, Mode.LIVE, limits=Limits(LIVE_TIMEOUT_S, 1), created_ns=start_ns
        )
        row = rollout_to_row(live, write.now_ns)
        row |= {"project": write.project, "status": str(RolloutStatus.RUNNING), "attempts": 1}
        write.connection.execute(_insert_rollout, row)
        deadline_ns = write.now_ns + int(LIVE_TIMEOUT_S * 1e9)
        attempt = Attempt(
            id=attempt_ids[rollout_id],
            rollout_id=rollout_id,
            number=1,
            worker_id=LIVE_WORKER,
            lease_expires_ns=deadline_ns,  # nobody renews it: the deadline alone ends it
            deadline_ns=deadline_ns,
            started_ns=start_ns,
        )
        write.connection.execute(_insert_attempt, {**attempt_to_row(attempt), "project": write.project})
    return attempt_ids


def _assign_attempts(write: Write, rows: Sequence[SpanRow], live: Mapping[str, str]) -> None:
    """A span that names only its rollout belongs to the attempt that is under way."""
    lacking = {cast(str, row["rollout_id"]) for row in rows if row["attempt_id"] is None}
    if not lacking:
        return
    found = dict(live)
    if unknown := lacking - live.keys():
        found |= _latest_attempts(write, unknown)
    for row in rows:
        if row["attempt_id"] is None:
            row["attempt_id"] = found[cast(str, row["rollout_id"])]


def _latest_attempts(write: Write, ids: set[str]) -> dict[str, str]:
    query = sa.select(rollouts.c.id, rollouts.c.attempts).where(rollouts.c.project == write.project)
    numbers = {
        row.id: row.attempts
        for part in chunked(sorted(ids))
        for row in write.connection.execute(query.where(rollouts.c.id.in_(part)))
    }
    latest = {i: attempt_id_of(i, max(1, numbers.get(i, 1))) for i in ids}
    return latest | _live_attempts(write, ids)


def _live_attempts(write: Write, ids: set[str]) -> dict[str, str]:
    """Attempt ids of live rollouts, which may have been named by the client."""
    query = sa.select(attempts.c.rollout_id, attempts.c.id).where(
        attempts.c.project == write.project, attempts.c.worker_id == LIVE_WORKER
    )
    return {
        row.rollout_id: row.id
        for part in chunked(sorted(ids))
        for row in write.connection.execute(query.where(attempts.c.rollout_id.in_(part)))
    }


def _close_live(write: Write, live: set[str], rows: Sequence[SpanRow]) -> None:
    """A span without a parent is the last of its trace: it ends the live rollout."""
    for row in rows:
        rollout_id = cast(str, row["rollout_id"])
        if row["parent_id"] is not None or rollout_id not in live or row["scope"] == semconv.SCOPE_REWARD:
            continue
        live.discard(rollout_id)
        ended_ns = row["end_ns"] or write.now_ns
        status = RolloutStatus.FAILED if row["failed"] else RolloutStatus.SUCCEEDED
        attempt_status = AttemptStatus.FAILED if row["failed"] else AttemptStatus.SUCCEEDED
        write.connection.execute(
            rollouts.update()
            .where(
                rollouts.c.project == write.project,
                rollouts.c.id == rollout_id,
                rollouts.c.status == str(RolloutStatus.RUNNING),
            )
            .values(status=str(status), ended_ns=ended_ns)
        )
        write.connection.execute(
            attempts.update()
            .where(
                attempts.c.project == write.project,
                attempts.c.rollout_id == rollout_id,
                attempts.c.worker_id == LIVE_WORKER,
                attempts.c.status == str(AttemptStatus.RUNNING),
            )
            .values(status=str(attempt_status), ended_ns=ended_ns)
        )
        write.changes.final_rollouts.add((write.project, rollout_id))
        write.changes.known_rollouts.add((write.project, rollout_id))


def insert_rewards(write: Write, rollout_id: str, attempt_id: str, rewards: Sequence[Reward]) -> None:
    """Store rewards of an attempt that is known to exist."""
    made = [reward_span(rollout_id, attempt_id, reward) for reward in rewards]
    _insert_spans(write.connection, [{**row, "project": write.project, "parts": None} for row in made])


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
