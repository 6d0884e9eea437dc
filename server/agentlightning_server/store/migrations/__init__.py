"""Moving an older database to the newest schema, with Alembic.

`versions/` has one file a step. 0001 is the schema of 0.1.0, which had no version table of Alembic's.
Invariant: a database that is created and one that was moved have the same tables (tested).
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

FIRST, HEAD = "0001", "0002"
STEPS = (FIRST, HEAD)

version_table = sa.Table(
    "alembic_version", sa.MetaData(), sa.Column("version_num", sa.String(32), primary_key=True)
)


def revision(connection: sa.Connection) -> str | None:
    """The schema's step; None for an empty database, "" for one of another program."""
    tables = set(sa.inspect(connection).get_table_names())
    if version_table.name in tables:
        return connection.scalar(sa.select(version_table.c.version_num)) or ""
    if {"meta", "rollouts", "spans"} <= tables:
        return FIRST
    return "" if tables else None


def stamp(connection: sa.Connection, step: str) -> None:
    """Note the schema's step."""
    version_table.create(connection, checkfirst=True)
    connection.execute(version_table.delete())
    connection.execute(version_table.insert().values(version_num=step))


def upgrade(connection: sa.Connection) -> None:
    """Take all steps that are left, in the caller's transaction."""
    from alembic import command  # slow to import, and seldom needed
    from alembic.config import Config

    if not sa.inspect(connection).has_table(version_table.name):
        stamp(connection, FIRST)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    command.upgrade(config, HEAD)
