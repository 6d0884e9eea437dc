"""The queue of rollouts: enqueue, claim, heartbeat, finish, expire, cancel. Each is one write.

    queued --claim--> running --finish--> succeeded
      ^                  |  failed, timed out, lost
      '---- retry delay -'--------------> failed, after max_attempts

Not here: threads, futures and HTTP. Invariants: a rollout is claimed by compare-and-set, so by one worker; a
report counts only while its attempt is running (fencing by attempt id).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from agentlightning.errors import Conflict, InvalidInput, NotFound
from agentlightning.types import Attempt, AttemptStatus, Claim, Mode, Reward, Rollout, RolloutStatus

from .keys import Principal, Scope, drop_attempt_key, drop_attempt_keys, write_key
from .rows import Row, attempt_from_row, attempt_to_row, rollout_from_row, rollout_to_row
from .schema import attempts, rollouts
from .spans import attempt_id_of, insert_rewards
from .sql import InsertNew, Read, Write, chunked

LEASE_S = 30.0  # three heartbeats
RETRY_FIRST_S = 1.0
RETRY_FACTOR = 2.0
RETRY_CAP_S = 60.0
RETRY_JITTER = 0.2  # so that rollouts which failed together are not retried together
DEADLINE_GRACE_S = (
    5.0  # the worker ends a late attempt itself, with a better message; this is for when it cannot
)
MAX_ERROR_CHARS = 32_768

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:~@=+-]{0,254}")

# The statements of the hot path, made once: building them anew would take longer than running them.
_project: sa.BindParameter[str] = sa.bindparam("the_project")
_insert_rollouts = InsertNew(rollouts)
_insert_attempt = attempts.insert()
_select_ready = (
    sa.select(rollouts)
    .where(
        rollouts.c.project == _project,
        rollouts.c.status == str(RolloutStatus.QUEUED),
        rollouts.c.available_ns <= sa.bindparam("now_ns"),
    )
    .order_by(rollouts.c.seq)
    .limit(sa.bindparam("limit"))
)
_claim_rollout = (
    rollouts.update()
    .where(rollouts.c.seq == sa.bindparam("the_seq"), rollouts.c.status == str(RolloutStatus.QUEUED))
    .values(status=str(RolloutStatus.RUNNING), attempts=rollouts.c.attempts + 1)
)
_select_attempt = sa.select(attempts).where(
    attempts.c.project == _project, attempts.c.id == sa.bindparam("the_id")
)
_renew_lease = (
    attempts.update()
    .where(attempts.c.project == _project, attempts.c.id == sa.bindparam("the_id"))
    .values(lease_expires_ns=sa.bindparam("lease_expires_ns"))
)
_end_attempt = (
    attempts.update()
    .where(attempts.c.project == _project, attempts.c.id == sa.bindparam("the_id"))
    .values(status=sa.bindparam("status"), ended_ns=sa.bindparam("ended_ns"), error=sa.bindparam("error"))
)
_select_rollout = sa.select(rollouts).where(
    rollouts.c.project == _project, rollouts.c.id == sa.bindparam("the_id")
)
_move_rollout = (
    rollouts.update()
    .where(rollouts.c.project == _project, rollouts.c.id == sa.bindparam("the_id"))
    .values(
        status=sa.bindparam("status"),
        failures=sa.bindparam("failures"),
        available_ns=sa.bindparam("available_ns"),
        ended_ns=sa.bindparam("ended_ns"),
    )
)


def check_id(rollout_id: str) -> str:
    """Rollout ids become parts of URLs. Raises InvalidInput."""
    if not _ID.fullmatch(rollout_id):
        raise InvalidInput(
            f"{rollout_id!r:.80} cannot be a rollout id: use 1 to 255 letters, digits and any of ._:~@=+- , "
            "starting with a letter or digit"
        )
    return rollout_id


def enqueue(write: Write, rows: Sequence[dict[str, Any]]) -> None:
    """Queue rollouts; those whose id exists are left as they are."""
    if rows:
        write.connection.execute(_insert_rollouts, [{**row, "project": write.project} for row in rows])
        new = {(write.project, row["id"]) for row in rows if row["mode"] != Mode.LIVE}
        write.changes.known_rollouts |= new
        write.changes.projects_with_work.add(write.project)


def rollout_rows(new: Sequence[Rollout], now_ns: int) -> list[dict[str, Any]]:
    """Checked rows for `enqueue`. Raises InvalidInput."""
    for rollout in new:
        check_id(rollout.id)
        if rollout.limits.max_attempts < 1 or not rollout.limits.start_to_close_s > 0:
            raise InvalidInput(f"rollout {rollout.id}: limits must allow one attempt of more than 0 s")
    return [rollout_to_row(rollout, now_ns) for rollout in new]


def claim(write: Write, worker_id: str, limit: int, model: str) -> list[Claim]:
    """Lease up to `limit` rollouts, in the order they were queued."""
    ready = write.execute(_select_ready, now_ns=write.now_ns, limit=limit).mappings().all()
    return [
        _claim_one(write, row, worker_id, model)
        for row in ready
        if write.connection.execute(_claim_rollout, {"the_seq": row["seq"]}).rowcount == 1
    ]


def next_ready_ns(read: Read) -> int | None:
    """When the next queued rollout becomes claimable; None when none is queued."""
    return read.connection.scalar(
        sa.select(sa.func.min(rollouts.c.available_ns)).where(
            rollouts.c.project == read.project, rollouts.c.status == str(RolloutStatus.QUEUED)
        )
    )


def _claim_one(write: Write, row: Row, worker_id: str, model: str) -> Claim:
    values = dict(row) | {"status": RolloutStatus.RUNNING}
    rollout = rollout_from_row(values)  # pyright: ignore[reportArgumentType] - a mapping with the row's keys
    number = row["attempts"] + 1
    attempt = Attempt(
        id=attempt_id_of(rollout.id, number),
        rollout_id=rollout.id,
        number=number,
        worker_id=worker_id,
        lease_expires_ns=write.now_ns + int(LEASE_S * 1e9),
        deadline_ns=write.now_ns + int(rollout.limits.start_to_close_s * 1e9),
        started_ns=write.now_ns,
    )
    write.connection.execute(_insert_attempt, {**attempt_to_row(attempt), "project": write.project})
    key = write_key(write, Principal(Scope.ATTEMPT, write.project, rollout.id, attempt.id))
    return Claim(rollout, attempt, key, model)


def heartbeat(write: Write, attempt_id: str, worker_id: str) -> bool:
    """Renew the lease. True: the attempt was cancelled, end it. Raises NotFound, Conflict."""
    attempt = _attempt(write, attempt_id)
    _check_owner(attempt, worker_id)
    if attempt.status is AttemptStatus.CANCELLED:
        return True
    _check_running(attempt)
    write.execute(_renew_lease, the_id=attempt_id, lease_expires_ns=write.now_ns + int(LEASE_S * 1e9))
    return False


def finish(
    write: Write,
    attempt_id: str,
    worker_id: str,
    status: AttemptStatus,
    error: str | None,
    rewards: Sequence[Reward],
) -> None:
    """End an attempt with its rewards. The same report again is no error, a different one is a Conflict.

    SUCCEEDED ends the rollout. CANCELLED, from a worker that shuts down, queues it again at once and does not
    count as a try; everything else is retried after a delay until `max_attempts`.
    """
    if status is AttemptStatus.RUNNING:
        raise InvalidInput("an attempt cannot finish as running")
    attempt = _attempt(write, attempt_id)
    _check_owner(attempt, worker_id)
    if attempt.status is status and attempt.status is not AttemptStatus.CANCELLED:
        return  # a report that was sent again because its answer got lost
    _check_running(attempt)
    insert_rewards(write, attempt.rollout_id, attempt_id, rewards)
    _end(write, attempt, status, error)


def expire(write: Write) -> int:
    """End attempts of all projects whose lease or deadline ran out, as their worker would have.

    Returns how many.
    """
    grace_ns = int(DEADLINE_GRACE_S * 1e9)
    late = (
        sa.select(attempts)
        .where(attempts.c.status == str(AttemptStatus.RUNNING))
        .where(
            (attempts.c.lease_expires_ns < write.now_ns) | (attempts.c.deadline_ns < write.now_ns - grace_ns)
        )
    )
    ended = [(row["project"], attempt_from_row(row)) for row in write.connection.execute(late).mappings()]
    for project, attempt in ended:
        if attempt.deadline_ns < write.now_ns:
            seconds = (attempt.deadline_ns - attempt.started_ns) / 1e9
            status, error = AttemptStatus.TIMED_OUT, f"not finished within its {seconds:g} s"
        else:
            status = AttemptStatus.LOST
            error = f"worker {attempt.worker_id} sent no heartbeat for {LEASE_S:g} s"
        _end(replace(write, project=project), attempt, status, error)
    return len(ended)


def cancel(write: Write, rollout_ids: Sequence[str]) -> None:
    """End rollouts and their running attempts; final ones stay as they are. Raises NotFound, ending none."""
    for part in chunked(rollout_ids):
        check_exist(write, part)
        live = [
            row.id
            for row in write.connection.execute(
                sa.select(rollouts.c.id).where(
                    rollouts.c.project == write.project,
                    rollouts.c.id.in_(part),
                    rollouts.c.status.in_([str(RolloutStatus.QUEUED), str(RolloutStatus.RUNNING)]),
                )
            )
        ]
        running = write.connection.execute(
            sa.select(attempts.c.id).where(
                attempts.c.project == write.project,
                attempts.c.rollout_id.in_(live),
                attempts.c.status == str(AttemptStatus.RUNNING),
            )
        )
        _cancel(write, live, [row.id for row in running])


def _cancel(write: Write, rollout_ids: Sequence[str], attempt_ids: Sequence[str]) -> None:
    write.connection.execute(
        rollouts.update()
        .where(rollouts.c.project == write.project, rollouts.c.id.in_(rollout_ids))
        .values(status=str(RolloutStatus.CANCELLED), ended_ns=write.now_ns)
    )
    write.connection.execute(
        attempts.update()
        .where(attempts.c.project == write.project, attempts.c.id.in_(attempt_ids))
        .values(status=str(AttemptStatus.CANCELLED), ended_ns=write.now_ns, error="the rollout was cancelled")
    )
    drop_attempt_keys(write, attempt_ids)
    write.changes.final_rollouts |= {(write.project, rollout_id) for rollout_id in rollout_ids}


def check_exist(read: Read | Write, rollout_ids: Sequence[str]) -> None:
    """Raises NotFound naming one that does not."""
    found = {
        row.id
        for part in chunked(rollout_ids)
        for row in read.connection.execute(
            sa.select(rollouts.c.id).where(rollouts.c.project == read.project, rollouts.c.id.in_(part))
        )
    }
    for rollout_id in rollout_ids:
        if rollout_id not in found:
            raise NotFound(
                f"there is no rollout {rollout_id!r:.300}; enqueue it first, or look at its spelling"
            )


def retry_delay_s(failures: int, jitter: float) -> float:
    """Seconds before the next try after that many failures; `jitter` in 0..1 lengthens it by up to 20 %."""
    plain = min(RETRY_CAP_S, RETRY_FIRST_S * RETRY_FACTOR ** min(failures - 1, 16))
    return plain * (1 + RETRY_JITTER * jitter)


def _attempt(write: Write, attempt_id: str) -> Attempt:
    row = write.execute(_select_attempt, the_id=attempt_id).mappings().first()
    if row is None:
        raise NotFound(f"there is no attempt {attempt_id!r:.300}")
    return attempt_from_row(row)


def _check_owner(attempt: Attempt, worker_id: str) -> None:
    if attempt.worker_id != worker_id:
        raise Conflict(
            f"attempt {attempt.id} belongs to worker {attempt.worker_id}, not to {worker_id}: "
            "stop working on it"
        )


def _check_running(attempt: Attempt) -> None:
    if attempt.status is not AttemptStatus.RUNNING:
        raise Conflict(f"attempt {attempt.id} has ended as {attempt.status}: stop working on it")


def _end(write: Write, attempt: Attempt, status: AttemptStatus, error: str | None) -> None:
    write.execute(
        _end_attempt,
        the_id=attempt.id,
        status=str(status),
        ended_ns=write.now_ns,
        error=None if error is None else shorten(error),
    )
    drop_attempt_key(write, attempt.id)
    rollout = write.execute(_select_rollout, the_id=attempt.rollout_id).mappings().one()
    if rollout["status"] == RolloutStatus.RUNNING:
        _move_on(write, rollout, status)


def _move_on(write: Write, rollout: Row, status: AttemptStatus) -> None:
    failures = rollout["failures"] + (status not in (AttemptStatus.SUCCEEDED, AttemptStatus.CANCELLED))
    available_ns = 0
    if status is AttemptStatus.SUCCEEDED:
        after = RolloutStatus.SUCCEEDED
    elif status is AttemptStatus.CANCELLED:
        after = RolloutStatus.QUEUED
    elif failures < rollout["max_attempts"] and rollout["mode"] != Mode.LIVE:
        after = RolloutStatus.QUEUED
        available_ns = write.now_ns + int(retry_delay_s(failures, random.random()) * 1e9)
    else:
        after = RolloutStatus.FAILED
    write.execute(
        _move_rollout,
        the_id=rollout["id"],
        status=str(after),
        failures=failures,
        available_ns=available_ns,
        ended_ns=write.now_ns if after.final else None,
    )
    if after.final:
        write.changes.final_rollouts.add((write.project, rollout["id"]))
    else:
        write.changes.projects_with_work.add(write.project)


def shorten(error: str) -> str:
    """An error that fits: the end of a traceback says more than its middle."""
    if len(error) <= MAX_ERROR_CHARS:
        return error
    half = MAX_ERROR_CHARS // 2
    return f"{error[:half]}\n... {len(error) - MAX_ERROR_CHARS} characters left out ...\n{error[-half:]}"
