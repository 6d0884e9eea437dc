"""Databases of earlier versions open, with everything in them (R17)."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from tests.support.postgres import new_database
from tests.support.stores import plain_span, queued

from agentlightning.errors import StoreError
from agentlightning.types import AttemptStatus, RolloutStatus
from agentlightning_server.auth import KeyScope
from agentlightning_server.store import Store
from agentlightning_server.store.migrations import HEAD, revision
from agentlightning_server.store.schema import metadata

FIRST = Path(__file__).parent / "data" / "schema-0.1.0.sql"


def old_database(folder: Path) -> Path:
    path = folder / "old.db"
    with sqlite3.connect(path) as database:
        database.executescript(FIRST.read_text())
    database.close()
    return path


def test_a_database_of_the_first_version_opens_with_all_that_is_in_it(tmp_path: Path) -> None:
    with Store(old_database(tmp_path)) as store:
        assert store.rollout("r").status is RolloutStatus.SUCCEEDED
        assert [attempt.id for attempt in store.attempts("r")] == ["r-1"]
        (span,) = store.spans("r")
        assert (span.name, span.trace_id) == ("work", f"{10:032x}")
        owner = store.principal("k")
        assert owner is not None
        assert (owner.scope, owner.project) == (KeyScope.RUNNER, "default")
        assert store.run("run") == {"step": 2}
        (key,) = store.keys()
        store.revoke_key(key.id)
        assert store.principal("k") is None


def test_it_works_on_from_there(tmp_path: Path) -> None:
    with Store(old_database(tmp_path)) as store:
        assert [claim.rollout.id for claim in store.claim("w", 5)] == ["waits"]
        store.enqueue([queued("r"), queued("new")])  # the first is there already
        store.add_spans([plain_span(9, "new")])
        store.of("other").enqueue([queued("r")])
        store.finish("waits-1", "w", AttemptStatus.SUCCEEDED)
        assert store.counts() == {"succeeded": 2, "queued": 1}
    with Store(tmp_path / "old.db") as store:  # the second opening moves nothing
        assert store.counts() == {"succeeded": 2, "queued": 1}


def test_a_moved_database_has_the_tables_of_a_new_one(tmp_path: Path) -> None:
    Store(old_database(tmp_path)).close()
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    try:
        with engine.connect() as connection:
            assert revision(connection) == HEAD
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            found = [change for change in compare_metadata(context, metadata) if change[0] != "remove_table"]
            assert found == []
    finally:
        engine.dispose()


def test_new_databases_are_of_the_newest_schema_on_both_kinds(tmp_path: Path) -> None:
    for where in (tmp_path / "new.db", new_database()):
        with Store(where) as store, store.reading() as connection:
            assert revision(connection) == HEAD


def test_a_move_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    path = old_database(tmp_path)
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE chunks (in_the_way)")
    database.close()
    with pytest.raises(StoreError, match="chunks"):
        Store(path)
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT value FROM meta").fetchone() == ("1",)
        assert database.execute("SELECT count(*) FROM rollouts").fetchone() == (2,)
    database.close()
