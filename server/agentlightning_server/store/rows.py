"""Rows of the store to the vocabulary's types and back. Not here: SQL, and spans (`otlp_pb`)."""

from __future__ import annotations

from typing import Any

import orjson
import sqlalchemy as sa

from agentlightning.errors import InvalidInput
from agentlightning.types import Attempt, AttemptStatus, Json, Limits, Mode, Rollout, RolloutStatus, Task

Row = sa.RowMapping


def rollout_to_row(rollout: Rollout, now_ns: int) -> dict[str, Any]:
    """The row of a rollout that is about to be queued."""
    return {
        "id": rollout.id,
        "run_id": rollout.run_id,
        "group_id": rollout.group_id,
        "mode": str(rollout.mode),
        "status": str(RolloutStatus.QUEUED),
        "policy_version": rollout.policy_version,
        "task": None if rollout.task is None else _task_to_json(rollout.task),
        "start_to_close_s": rollout.limits.start_to_close_s,
        "max_attempts": rollout.limits.max_attempts,
        "attempts": 0,
        "failures": 0,
        "available_ns": 0,
        "created_ns": rollout.created_ns or now_ns,
        "ended_ns": None,
    }


def rollout_from_row(row: Row) -> Rollout:
    """The rollout of a row of `rollouts`."""
    return Rollout(
        id=row["id"],
        task=None if row["task"] is None else Task(**orjson.loads(row["task"])),
        group_id=row["group_id"],
        mode=Mode(row["mode"]),
        policy_version=row["policy_version"],
        limits=Limits(row["start_to_close_s"], row["max_attempts"]),
        status=RolloutStatus(row["status"]),
        run_id=row["run_id"],
        created_ns=row["created_ns"],
        ended_ns=row["ended_ns"],
    )


def attempt_to_row(attempt: Attempt) -> dict[str, Any]:
    """The row of an attempt."""
    return {
        "id": attempt.id,
        "rollout_id": attempt.rollout_id,
        "number": attempt.number,
        "worker_id": attempt.worker_id,
        "status": str(attempt.status),
        "lease_expires_ns": attempt.lease_expires_ns,
        "deadline_ns": attempt.deadline_ns,
        "started_ns": attempt.started_ns,
        "ended_ns": attempt.ended_ns,
        "error": attempt.error,
    }


def attempt_from_row(row: Row) -> Attempt:
    """The attempt of a row of `attempts`."""
    return Attempt(
        id=row["id"],
        rollout_id=row["rollout_id"],
        number=row["number"],
        worker_id=row["worker_id"],
        status=AttemptStatus(row["status"]),
        lease_expires_ns=row["lease_expires_ns"],
        deadline_ns=row["deadline_ns"],
        started_ns=row["started_ns"],
        ended_ns=row["ended_ns"],
        error=row["error"],
    )


def to_json(value: Json, what: str) -> bytes:
    """JSON bytes. Raises InvalidInput naming `what`."""
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise InvalidInput(f"{what} cannot be written as JSON: {error}") from error


def _task_to_json(task: Task) -> bytes:
    return to_json(
        {"id": task.id, "input": task.input, "split": task.split}, f"the input of task {task.id!r}"
    )
