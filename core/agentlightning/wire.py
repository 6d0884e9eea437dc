"""The vocabulary as JSON objects, for the REST API: one codec that server and client share.

Not here: spans, which travel as OTLP (`otlp`), and JSON text.
Invariant: `x_from_json(x_to_json(x)) == x`; whatever else comes in leaves as InvalidInput with the place
named, or as InvalidReward for a reward that is no finite number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, TypeVar, cast

from agentlightning.errors import InvalidInput, InvalidReward
from agentlightning.types import (
    Attempt,
    AttemptStatus,
    Claim,
    Json,
    Limits,
    Mode,
    Reward,
    Rollout,
    RolloutStatus,
    Task,
)

E = TypeVar("E", bound=StrEnum)
MAX_INT64 = 2**63 - 1


# --- writing -------------------------------------------------------------------------------------


def rollout_to_json(rollout: Rollout) -> dict[str, Json]:
    """A rollout as a JSON object."""
    task = rollout.task
    return {
        "id": rollout.id,
        "task": None if task is None else {"id": task.id, "input": task.input, "split": task.split},
        "group_id": rollout.group_id,
        "mode": str(rollout.mode),
        "policy_version": rollout.policy_version,
        "limits": {
            "start_to_close_s": rollout.limits.start_to_close_s,
            "max_attempts": rollout.limits.max_attempts,
        },
        "status": str(rollout.status),
        "run_id": rollout.run_id,
        "created_ns": rollout.created_ns,
        "ended_ns": rollout.ended_ns,
    }


def attempt_to_json(attempt: Attempt) -> dict[str, Json]:
    """An attempt as a JSON object."""
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


def claim_to_json(claim: Claim) -> dict[str, Json]:
    """A claim as a JSON object, its key included."""
    return {
        "rollout": rollout_to_json(claim.rollout),
        "attempt": attempt_to_json(claim.attempt),
        "key": claim.key,
        "model": claim.model,
    }


def reward_to_json(reward: Reward) -> dict[str, Json]:
    """A reward as a JSON object."""
    return {
        "value": reward.value,
        "name": reward.name,
        "target": reward.target,
        "time_ns": reward.time_ns,
    }


# --- reading -------------------------------------------------------------------------------------


class Reader:
    """Typed access to a JSON object; what is missing or mistyped is an InvalidInput naming the place."""

    __slots__ = ("_body", "_place")

    def __init__(self, body: object, place: str) -> None:
        if not isinstance(body, Mapping):
            raise InvalidInput(f"{place} must be a JSON object")
        self._body = cast(Mapping[str, Any], body)
        self._place = place

    def text(self, name: str, default: str | None = None) -> str:
        """Text; required without a default."""
        value = self._body.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._wrong(name, "text")
        return value

    def optional_text(self, name: str) -> str | None:
        """Text or null."""
        return None if self._body.get(name) is None else self.text(name)

    def integer(self, name: str, default: int, low: int = 0, high: int = MAX_INT64) -> int:
        """A whole number from `low` to `high`."""
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(name, f"a whole number from {low} to {high}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """A whole number or null."""
        return None if self._body.get(name) is None else self.integer(name, 0)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A finite number from `low` to `high`."""
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def member(self, name: str, kind: type[E], default: E | None = None) -> E:
        """One of the values of an enumeration."""
        value = self._body.get(name)
        if value is None and default is not None:
            return default
        try:
            return kind(value)
        except ValueError:
            raise self._wrong(name, " or ".join(f'"{item}"' for item in kind)) from None

    def items(self, name: str) -> Sequence[object]:
        """An array; empty when missing."""
        value = self._body.get(name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            raise self._wrong(name, "an array")
        return cast(Sequence[object], value)

    def texts(self, name: str) -> list[str]:
        """An array of texts."""
        values = self.items(name)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(name, "an array of texts")
        return cast(list[str], list(values))

    def raw(self, name: str) -> Any:
        """Whatever is there."""
        return self._body.get(name)

    def object(self, name: str) -> Reader:
        """A nested object; empty when missing."""
        value = self._body.get(name)
        return Reader({} if value is None else value, f"{self._place}.{name}")

    def _wrong(self, name: str, expected: str) -> InvalidInput:
        return InvalidInput(f"{self._place}.{name} must be {expected}, got {self._body.get(name)!r:.80}")


def rollout_from_json(body: object, place: str = "rollout") -> Rollout:
    """Raises InvalidInput."""
    read = Reader(body, place)
    limits = read.object("limits")
    plain = Limits()
    return Rollout(
        id=read.text("id"),
        task=None if read.raw("task") is None else _task(read.object("task")),
        group_id=read.text("group_id", default=read.text("id")),
        mode=read.member("mode", Mode, Mode.TRAIN),
        policy_version=read.optional_integer("policy_version"),
        limits=Limits(
            limits.number("start_to_close_s", plain.start_to_close_s, 1e-3, 1e6),
            limits.integer("max_attempts", plain.max_attempts, low=1, high=1000),
        ),
        status=read.member("status", RolloutStatus, RolloutStatus.QUEUED),
        run_id=read.optional_text("run_id"),
        created_ns=read.integer("created_ns", 0),
        ended_ns=read.optional_integer("ended_ns"),
    )


def _task(read: Reader) -> Task:
    return Task(id=read.text("id"), input=read.raw("input"), split=read.text("split", "train"))


def attempt_from_json(body: object, place: str = "attempt") -> Attempt:
    """Raises InvalidInput."""
    read = Reader(body, place)
    return Attempt(
        id=read.text("id"),
        rollout_id=read.text("rollout_id"),
        number=read.integer("number", 1),
        worker_id=read.text("worker_id"),
        status=read.member("status", AttemptStatus),
        lease_expires_ns=read.integer("lease_expires_ns", 0),
        deadline_ns=read.integer("deadline_ns", 0),
        started_ns=read.integer("started_ns", 0),
        ended_ns=read.optional_integer("ended_ns"),
        error=read.optional_text("error"),
    )


def claim_from_json(body: object, place: str = "claim") -> Claim:
    """Raises InvalidInput."""
    read = Reader(body, place)
    return Claim(
        rollout_from_json(read.raw("rollout"), f"{place}.rollout"),
        attempt_from_json(read.raw("attempt"), f"{place}.attempt"),
        read.text("key"),
        read.text("model"),
    )


def reward_from_json(body: object, place: str = "reward") -> Reward:
    """Raises InvalidReward for a value that is not a finite number, InvalidInput for the rest."""
    read = Reader(body, place)
    return Reward(
        value=finite(read.raw("value"), f"{place}.value"),
        name=read.text("name", "reward"),
        target=read.optional_text("target"),
        time_ns=read.integer("time_ns", 0),
    )


FLOAT32_MAX = 3.4028234663852886e38


def finite(value: object, place: str) -> float:
    """The value as a float. Raises InvalidReward when it is not finite in single precision, which learns."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if abs(number) <= FLOAT32_MAX:
            return number
    raise InvalidReward(f"{place} must be a finite number, got {value!r:.80}")
