"""The tables, for SQLite and PostgreSQL alike.

Not here: opening a database (`database`), moving an older one here (`migrations`), what is read and written.
Invariant: every row belongs to one project, and no key, id or index reaches across projects.
"""

from __future__ import annotations

import sqlalchemy as sa

DEFAULT_PROJECT = "default"

metadata = sa.MetaData()
_Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts up only what it calls INTEGER


def _project() -> sa.Column[str]:
    return sa.Column("project", sa.Text, nullable=False, server_default=DEFAULT_PROJECT)


meta = sa.Table(  # read by version 0.1 only, which so learns that it cannot open this
    "meta",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

rollouts = sa.Table(
    "rollouts",
    metadata,
    sa.Column("seq", _Number, primary_key=True, autoincrement=True),  # order of the queue and of listings
    _project(),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text),
    sa.Column("group_id", sa.Text, nullable=False),
    sa.Column("mode", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("policy_version", sa.BigInteger),
    sa.Column("task", sa.LargeBinary),  # JSON
    sa.Column("start_to_close_s", sa.Float, nullable=False),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),  # made so far
    sa.Column("failures", sa.Integer, nullable=False),  # of those, the ones that count against max_attempts
    sa.Column("available_ns", sa.BigInteger, nullable=False),  # not claimed before, for the retry delay
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("ended_ns", sa.BigInteger),
    sa.Index("rollouts_by_id", "project", "id", unique=True),
    sa.Index("rollouts_by_project", "project", "seq"),
    sa.Index("rollouts_by_status", "project", "status", "seq"),
    sa.Index("rollouts_by_run", "project", "run_id", "seq"),
    sqlite_autoincrement=True,
)

attempts = sa.Table(
    "attempts",
    metadata,
    _project(),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("rollout_id", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("worker_id", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("lease_expires_ns", sa.BigInteger, nullable=False),
    sa.Column("deadline_ns", sa.BigInteger, nullable=False),
    sa.Column("started_ns", sa.BigInteger, nullable=False),
    sa.Column("ended_ns", sa.BigInteger),
    sa.Column("error", sa.Text),
    sa.PrimaryKeyConstraint("project", "id", name="attempts_by_id"),
    sa.Index("attempts_by_rollout", "project", "rollout_id", "number", unique=True),
    sa.Index("attempts_running", "status", "lease_expires_ns"),
)

spans = sa.Table(
    "spans",
    metadata,
    sa.Column("seq", _Number, primary_key=True, autoincrement=True),
    _project(),
    sa.Column("trace_id", sa.Text, nullable=False),
    sa.Column("span_id", sa.Text, nullable=False),
    sa.Column("parent_id", sa.Text),
    sa.Column("rollout_id", sa.Text, nullable=False),
    sa.Column("attempt_id", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("start_ns", sa.BigInteger, nullable=False),
    sa.Column("end_ns", sa.BigInteger, nullable=False),
    sa.Column("failed", sa.Boolean, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),  # protobuf: ResourceSpans without spans
    sa.Column("body", sa.LargeBinary, nullable=False),  # protobuf: Span, without the values in `parts`
    sa.Column("parts", sa.LargeBinary),  # where its long values are, see `longvalues`
    sa.Index("spans_by_id", "project", "trace_id", "span_id", unique=True),
    sa.Index("spans_by_attempt", "project", "rollout_id", "attempt_id", "start_ns"),
)

chunks = sa.Table(  # pieces of long values, each kept once per rollout
    "chunks",
    metadata,
    _project(),
    sa.Column("rollout_id", sa.Text, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Column("parent", sa.LargeBinary),  # hash of the piece before; none for a first one
    sa.Column("data", sa.LargeBinary, nullable=False),
    # With row ids: SQLite would give each piece of a table without them a page of its own.
    sa.PrimaryKeyConstraint("project", "rollout_id", "hash", name="chunks_by_hash"),
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("hash", sa.Text, primary_key=True),  # SHA-256, hex
    _project(),
    sa.Column("id", sa.Text),  # to name the key by; none for an attempt's
    sa.Column("name", sa.Text),  # what its maker calls it
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("rollout_id", sa.Text),
    sa.Column("attempt_id", sa.Text),
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("expires_ns", sa.BigInteger),
    sa.Index("keys_by_attempt", "project", "attempt_id"),
    sa.Index("keys_by_name", "project", "id", unique=True),
)

runs = sa.Table(
    "runs",
    metadata,
    _project(),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("state", sa.LargeBinary, nullable=False),  # JSON
    sa.Column("created_ns", sa.BigInteger, nullable=False),
    sa.Column("updated_ns", sa.BigInteger, nullable=False),
    sa.PrimaryKeyConstraint("project", "id", name="runs_by_id"),
)
