"""Projects, named keys, and long values of spans kept once.

Tables whose key changes are made anew and filled from the old ones; rows get the project "default".
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_OLD_INDEXES = {
    "rollouts": ("rollouts_by_status", "rollouts_by_run"),
    "attempts": ("attempts_by_rollout", "attempts_running"),
    "keys": ("keys_by_attempt",),
    "runs": (),
}
_PROJECT = "project TEXT DEFAULT 'default' NOT NULL"


def upgrade() -> None:
    """Move the rows of 0.1.0."""
    for table, indexes in _OLD_INDEXES.items():
        for index in indexes:
            op.drop_index(index)
        op.rename_table(table, f"old_{table}")
    for statement in _NEW_TABLES:
        op.execute(statement)
    for table in _OLD_INDEXES:
        _copy(table)
        op.drop_table(f"old_{table}")
    op.execute("UPDATE keys SET id = 'key-' || substr(hash, 1, 12) WHERE scope <> 'attempt'")
    op.drop_index("spans_by_id")
    op.drop_index("spans_by_attempt")
    op.execute(f"ALTER TABLE spans ADD COLUMN {_PROJECT}")
    op.execute("ALTER TABLE spans ADD COLUMN parts BLOB")
    for name, table, columns, unique in _INDEXES:
        op.create_index(name, table, columns, unique=unique)
    op.execute("UPDATE meta SET value = '2' WHERE key = 'schema_version'")


def _copy(table: str) -> None:
    columns = [column["name"] for column in sa.inspect(op.get_bind()).get_columns(f"old_{table}")]
    names = ", ".join(columns)
    op.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM old_{table}")


_NEW_TABLES = (
    f"""CREATE TABLE rollouts (
        seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, {_PROJECT}, id TEXT NOT NULL, run_id TEXT,
        group_id TEXT NOT NULL, mode TEXT NOT NULL, status TEXT NOT NULL, policy_version BIGINT, task BLOB,
        start_to_close_s FLOAT NOT NULL, max_attempts INTEGER NOT NULL, attempts INTEGER NOT NULL,
        failures INTEGER NOT NULL, available_ns BIGINT NOT NULL, created_ns BIGINT NOT NULL, ended_ns BIGINT)
    """,
    f"""CREATE TABLE attempts (
        {_PROJECT}, id TEXT NOT NULL, rollout_id TEXT NOT NULL, number INTEGER NOT NULL,
        worker_id TEXT NOT NULL, status TEXT NOT NULL, lease_expires_ns BIGINT NOT NULL,
        deadline_ns BIGINT NOT NULL, started_ns BIGINT NOT NULL, ended_ns BIGINT, error TEXT,
        CONSTRAINT attempts_by_id PRIMARY KEY (project, id))
    """,
    f"""CREATE TABLE chunks (
        {_PROJECT}, rollout_id TEXT NOT NULL, hash BLOB NOT NULL, parent BLOB, data BLOB NOT NULL,
        CONSTRAINT chunks_by_hash PRIMARY KEY (project, rollout_id, hash))
    """,
    f"""CREATE TABLE keys (
        hash TEXT NOT NULL PRIMARY KEY, {_PROJECT}, id TEXT, name TEXT, scope TEXT NOT NULL, rollout_id TEXT,
        attempt_id TEXT, created_ns BIGINT NOT NULL, expires_ns BIGINT)
    """,
    f"""CREATE TABLE runs (
        {_PROJECT}, id TEXT NOT NULL, state BLOB NOT NULL, created_ns BIGINT NOT NULL,
        updated_ns BIGINT NOT NULL, CONSTRAINT runs_by_id PRIMARY KEY (project, id))
    """,
)
_INDEXES = (
    ("rollouts_by_id", "rollouts", ["project", "id"], True),
    ("rollouts_by_project", "rollouts", ["project", "seq"], False),
    ("rollouts_by_status", "rollouts", ["project", "status", "seq"], False),
    ("rollouts_by_run", "rollouts", ["project", "run_id", "seq"], False),
    ("attempts_by_rollout", "attempts", ["project", "rollout_id", "number"], True),
    ("attempts_running", "attempts", ["status", "lease_expires_ns"], False),
    ("spans_by_id", "spans", ["project", "trace_id", "span_id"], True),
    ("spans_by_attempt", "spans", ["project", "rollout_id", "attempt_id", "start_ns"], False),
    ("keys_by_attempt", "keys", ["project", "attempt_id"], False),
    ("keys_by_name", "keys", ["project", "id"], True),
)
