"""`agl keys` and `agl store`: on a running server, and on databases of both kinds."""

from __future__ import annotations

import gzip
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.stores import DATABASES, StoreServer, new_database, plain_span, queued, store_server
from typer.testing import CliRunner

from agentlightning.errors import InvalidInput, StoreError
from agentlightning.export import spans_from_file
from agentlightning.types import AttemptStatus, Reward
from agentlightning_server.auth import KeyScope
from agentlightning_server.cli.commands import app
from agentlightning_server.store import Store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[StoreServer]:
    with store_server(tmp_path_factory.mktemp("cli")) as running:
        yield running


def agl(*arguments: object, code: int = 0) -> str:
    """Standard output of a command."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def on(server: StoreServer, *arguments: object) -> str:
    return agl("keys", *arguments, "--server", server.url, "--key", server.key)


def test_a_key_is_printed_once_works_and_ends_when_revoked(server: StoreServer) -> None:
    key = on(server, "create", "--scope", "trainer", "--name", "nightly").strip()
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.get(server.url + "/api/rollouts", headers=headers).status_code == 200
    shown = on(server, "list")
    (line,) = [line for line in shown.splitlines() if "nightly" in line]
    assert key not in shown
    assert "never ends" in line
    on(server, "revoke", line.split()[0])
    assert httpx.get(server.url + "/api/rollouts", headers=headers).status_code == 401
    assert "nightly" not in on(server, "list")


def test_keys_of_another_project_and_with_an_end(server: StoreServer) -> None:
    on(server, "create", "--scope", "runner", "--project", "b", "--expires-days", 2)
    (made,) = json.loads(on(server, "list", "--project", "b", "--json"))
    assert 1.9 < (made["expires_ns"] - made["created_ns"]) / 86_400e9 < 2.1
    assert made["id"] not in on(server, "list")


def test_an_unknown_scope_is_refused_by_name(server: StoreServer) -> None:
    for scope in ("attempt", "root"):
        with pytest.raises(InvalidInput, match=scope):
            on(server, "create", "--scope", scope)


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    where = new_database(request.param, tmp_path)
    with Store(where) as store:
        store.enqueue([queued("r"), queued("waits")])
        store.claim("w")
        store.add_spans([plain_span(1, "r", attributes={"text": "long" * 3000})])
        store.finish("r-1", "w", AttemptStatus.SUCCEEDED, rewards=[Reward(0.5)])
        store.of("other").mint_key(KeyScope.RUNNER)
    return where


def test_a_sound_database_has_no_problems(database: Path | str) -> None:
    assert agl("store", "check", database) == ""


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("DELETE FROM rollouts WHERE id = 'r'", "2 spans belong to a rollout that is not there"),
        ("DELETE FROM chunks WHERE parent IS NULL", "1 long values have lost a piece"),
        ("UPDATE rollouts SET status = 'running' WHERE id = 'r'", "1 rollouts are running without"),
    ],
)
def test_damage_is_told_with_its_number(database: Path | str, damage: str, sentence: str) -> None:
    with Store(database) as store:
        store._submit(lambda write: write.connection.exec_driver_sql(damage)).result()  # pyright: ignore[reportPrivateUsage]
    assert sentence in agl("store", "check", database, code=1)


def test_the_old_is_deleted_and_the_rest_stays(database: Path | str) -> None:
    agl("store", "vacuum", database, "--older-than-days", 0)
    with Store(database) as store:
        assert [rollout.id for rollout in store.rollouts()] == ["waits"]
    agl("store", "check", database)


def test_spans_are_written_as_otlp_that_reads_back(database: Path | str, tmp_path: Path) -> None:
    file = tmp_path / "spans.jsonl.gz"
    agl("store", "export", database, "--output", file)
    with gzip.open(file, "rt") as lines:
        assert len([json.loads(line) for line in lines]) == 1
    found: Any = list(spans_from_file(file))
    assert {span.rollout_id for span in found} == {"r"}
    assert {span.attributes.get("text") for span in found} == {"long" * 3000, None}


def test_migrating_makes_the_tables_and_a_missing_file_is_named(tmp_path: Path) -> None:
    agl("store", "migrate", new_database("postgresql", tmp_path))
    with pytest.raises(InvalidInput, match="does not exist"):
        agl("store", "migrate", tmp_path / "none.db")
    with pytest.raises(InvalidInput, match="mysql"):
        agl("store", "check", "mysql://host/name")
    with pytest.raises(StoreError, match="cannot be reached"):
        agl("store", "check", "postgresql://nobody:secret@127.0.0.1:9/name")
