"""API keys: who may do what. Only SHA-256 of a key is kept; the key itself is shown once, when it is made.

Not here: reading a request's key (`auth`). Invariants: a key belongs to one project; an attempt's key stops
working with the commit that ends the attempt.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from agentlightning.errors import NotFound

from ..settings import new_key
from .schema import DEFAULT_PROJECT, keys
from .sql import Read, Write, chunked

_insert_key = keys.insert()
_delete_key = keys.delete().where(
    keys.c.project == sa.bindparam("the_project"), keys.c.attempt_id == sa.bindparam("the_id")
)
_select_key = sa.select(keys).where(keys.c.hash == sa.bindparam("the_hash"))


class Scope(StrEnum):
    """What a key may do, each within its project.

    ADMIN all, the making of keys included. TRAINER queues, reads, cancels and rewards rollouts. RUNNER claims
    and reports them. REPORTER gives rewards. ATTEMPT, made for one attempt, calls the model and writes that
    attempt's spans, without rewards. All but REPORTER may call the model and write spans.
    """

    ADMIN = "admin"
    TRAINER = "trainer"
    RUNNER = "runner"
    REPORTER = "reporter"
    ATTEMPT = "attempt"


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom a key belongs to. The ids are those of an attempt's key, else None."""

    scope: Scope
    project: str = DEFAULT_PROJECT
    rollout_id: str | None = None
    attempt_id: str | None = None
    expires_ns: int | None = None

    def expired(self, now_ns: int) -> bool:
        """Whether its time is over."""
        return self.expires_ns is not None and self.expires_ns <= now_ns


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key that somebody made, without the key."""

    id: str
    name: str
    scope: Scope
    created_ns: int
    expires_ns: int | None


def hash_key(key: str) -> str:
    """What is stored of a key. A plain hash suffices: keys are 256 random bits, not passwords."""
    return hashlib.sha256(key.encode()).hexdigest()


def write_key(write: Write, principal: Principal, name: str = "") -> str:
    """Make a key and store its hash."""
    key = new_key(str(principal.scope))
    made = principal.scope is not Scope.ATTEMPT
    row = {
        "hash": hash_key(key),
        "project": write.project,
        "id": f"key-{secrets.token_hex(6)}" if made else None,
        "name": name if made else None,
        "scope": str(principal.scope),
        "rollout_id": principal.rollout_id,
        "attempt_id": principal.attempt_id,
        "created_ns": write.now_ns,
        "expires_ns": principal.expires_ns,
    }
    write.connection.execute(_insert_key, row)
    return key


def list_keys(read: Read) -> list[KeyInfo]:
    """The keys that somebody made, oldest first."""
    query = (
        sa.select(keys)
        .where(keys.c.project == read.project, keys.c.id.is_not(None))
        .order_by(keys.c.created_ns, keys.c.id)
    )
    return [
        KeyInfo(row["id"], row["name"] or "", Scope(row["scope"]), row["created_ns"], row["expires_ns"])
        for row in read.connection.execute(query).mappings()
    ]


def revoke_key(write: Write, key_id: str) -> None:
    """The key no longer works. Raises NotFound."""
    found = sa.and_(keys.c.project == write.project, keys.c.id == key_id)
    key_hash = write.connection.scalar(sa.select(keys.c.hash).where(found))
    if key_hash is None:
        raise NotFound(f"there is no key {key_id!r:.300}; `agl keys list` shows those that exist")
    drop_key(write, key_hash)


def drop_key(write: Write, key_hash: str) -> None:
    """The key with this hash no longer works."""
    write.connection.execute(keys.delete().where(keys.c.hash == key_hash))
    write.changes.revoked_keys.add(key_hash)


def drop_attempt_key(write: Write, attempt_id: str) -> None:
    """The key of this attempt no longer works."""
    write.execute(_delete_key, the_id=attempt_id)
    write.changes.ended_attempts.add((write.project, attempt_id))


def drop_attempt_keys(write: Write, attempt_ids: Collection[str]) -> None:
    """The keys of these attempts no longer work."""
    for part in chunked(sorted(attempt_ids)):
        write.connection.execute(
            keys.delete().where(keys.c.project == write.project, keys.c.attempt_id.in_(part))
        )
    write.changes.ended_attempts |= {(write.project, attempt_id) for attempt_id in attempt_ids}


def read_key(connection: sa.Connection, key_hash: str) -> Principal | None:
    """The owner of the key with this hash, of whatever project."""
    row = connection.execute(_select_key, {"the_hash": key_hash}).mappings().first()
    if row is None:
        return None
    return Principal(
        Scope(row["scope"]), row["project"], row["rollout_id"], row["attempt_id"], row["expires_ns"]
    )
