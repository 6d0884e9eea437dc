"""API keys: who may do what. Only SHA-256 of a key is kept; the key itself is shown once, when it is made.

Not here: reading a request's key (`auth`). Invariant: an attempt's key stops working with the commit that
ends the attempt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from ..settings import new_key
from .schema import keys
from .spans import chunks
from .writer import Changes

_insert_key = keys.insert()
_delete_key = keys.delete().where(keys.c.attempt_id == sa.bindparam("the_id"))


class Scope(StrEnum):
    """ADMIN may do all; RUNNER takes and reports rollouts; ATTEMPT calls the model and writes own spans."""

    ADMIN = "admin"
    RUNNER = "runner"
    ATTEMPT = "attempt"


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom a key belongs to. The ids are those of an attempt's key, else None."""

    scope: Scope
    rollout_id: str | None = None
    attempt_id: str | None = None


def hash_key(key: str) -> str:
    """What is stored of a key. A plain hash suffices: keys are 256 random bits, not passwords."""
    return hashlib.sha256(key.encode()).hexdigest()


def write_key(connection: sa.Connection, changes: Changes, principal: Principal, now_ns: int) -> str:
    """Make a key and store its hash."""
    key = new_key(str(principal.scope))
    row = {
        "hash": hash_key(key),
        "scope": str(principal.scope),
        "rollout_id": principal.rollout_id,
        "attempt_id": principal.attempt_id,
        "created_ns": now_ns,
    }
    connection.execute(_insert_key, row)
    changes.keys = True
    return key


def drop_attempt_key(connection: sa.Connection, changes: Changes, attempt_id: str) -> None:
    """The key of this attempt no longer works."""
    connection.execute(_delete_key, {"the_id": attempt_id})
    changes.ended_attempts.add(attempt_id)


def drop_attempt_keys(connection: sa.Connection, changes: Changes, attempt_ids: Collection[str]) -> None:
    """The keys of these attempts no longer work."""
    for part in chunks(sorted(attempt_ids)):
        connection.execute(keys.delete().where(keys.c.attempt_id.in_(part)))
    changes.ended_attempts |= set(attempt_ids)


def read_key(connection: sa.Connection, key_hash: str) -> Principal | None:
    """The owner of the key with this hash."""
    row = connection.execute(sa.select(keys).where(keys.c.hash == key_hash)).mappings().first()
    return None if row is None else Principal(Scope(row["scope"]), row["rollout_id"], row["attempt_id"])
