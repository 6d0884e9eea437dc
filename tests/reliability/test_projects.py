"""Two projects of one server: nothing of one is seen, changed or answered through the other (R9)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.support.stores import DATABASES, StoreServer, new_database, plain_span, queued, store_server

from agentlightning import otlp
from agentlightning.client import LightningClient
from agentlightning.types import AttemptStatus, Reward, RolloutStatus
from agentlightning_server.auth import KeyScope

# Every route that names something, and a body that it would take.
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/rollouts/{rollout}", None),
    ("GET", "/api/rollouts/{rollout}/spans", None),
    ("GET", "/api/rollouts/{rollout}/spans?attempt_id={rollout}-1", None),
    ("GET", "/api/rollouts?after={rollout}", None),
    ("POST", "/api/rollouts/wait", {"ids": ["{rollout}"]}),
    ("POST", "/api/rollouts/{rollout}/cancel", {}),
    ("POST", "/api/rollouts/{rollout}/rewards", {"value": 1}),
    ("POST", "/api/attempts/{rollout}-1/heartbeat", {"worker_id": "w"}),
    ("POST", "/api/attempts/{rollout}-1/finish", {"worker_id": "w", "status": "succeeded"}),
    ("POST", "/rollouts/{rollout}/attempts/{rollout}-1/v1/traces", {"resourceSpans": []}),
    ("DELETE", "/api/keys/{key}", None),
]


@pytest.fixture(scope="module", params=DATABASES)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[StoreServer]:
    folder = tmp_path_factory.mktemp("projects")
    with store_server(folder, database=new_database(request.param, folder)) as running:
        store = running.store.of("one")
        store.enqueue([queued("secret"), queued("waiting")])
        store.claim("w")
        store.add_spans([plain_span(1, "secret")])
        store.mint_key(KeyScope.TRAINER, "of one")
        yield running


@pytest.fixture(scope="module")
def other(server: StoreServer) -> dict[str, str]:
    """The other project's admin."""
    return {"Authorization": f"Bearer {server.store.of('two').mint_key(KeyScope.ADMIN)}"}


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_what_another_project_has_is_not_there(
    server: StoreServer, other: dict[str, str], method: str, path: str, body: Any
) -> None:
    names = {"rollout": "secret", "key": server.store.of("one").keys()[0].id}
    filled = {"ids": ["secret"]} if body == {"ids": ["{rollout}"]} else body
    answer = httpx.request(method, server.url + path.format(**names), json=filled, headers=other)
    assert answer.status_code == 404
    assert "secret" not in answer.text.replace("'secret", "")  # at most what was asked for
    assert server.store.of("one").rollout("secret").status is RolloutStatus.RUNNING
    assert len(server.store.of("one").spans("secret")) == 1


def test_lists_claims_and_metrics_show_ones_own(server: StoreServer, other: dict[str, str]) -> None:
    assert httpx.get(server.url + "/api/rollouts", headers=other).json() == {"rollouts": []}
    claimed = httpx.post(server.url + "/api/claims", json={"worker_id": "w", "max": 9}, headers=other)
    assert claimed.json() == {"claims": []}
    names = [key["name"] for key in httpx.get(server.url + "/api/keys", headers=other).json()["keys"]]
    assert names == [""]
    assert server.store.of("one").rollout("waiting").status is RolloutStatus.QUEUED


def test_the_same_ids_live_side_by_side(server: StoreServer) -> None:
    for project, text in (("left", "l"), ("right", "r")):
        store = server.store.of(project)
        store.enqueue([queued("twin", run_id="run")])
        store.claim("w")
        store.add_spans([plain_span(77, "twin", attributes={"text": text * 5000})])
        store.finish("twin-1", "w", AttemptStatus.SUCCEEDED, rewards=[Reward(1.0, time_ns=5)])
        store.set_run("run", {"of": project})
    for project, text in (("left", "l"), ("right", "r")):
        store = server.store.of(project)
        texts = {str(span.attributes.get("text")) for span in store.spans("twin")}
        assert texts == {text * 5000, "None"}
        assert store.run("run") == {"of": project}
        assert store.counts() == {"succeeded": 1}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 3)), max_size=12))
@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_spans_of_any_two_projects_never_mix(
    server: StoreServer, written: list[tuple[str, int, int]]
) -> None:
    prefix = f"mix{abs(hash(tuple(written)))}"
    stores = {name: server.store.of(f"{prefix}{name}") for name in "ab"}
    for name, rollout, number in written:
        stores[name].add_spans([plain_span(number, f"r{rollout}", name=name)])
    for name, store in stores.items():
        expected = {number: rollout for of, rollout, number in reversed(written) if of == name}
        for rollout in {r for of, r, _ in written if of == name}:
            spans = store.spans(f"r{rollout}")
            assert {s.name for s in spans} <= {name}
            assert len(spans) == sum(r == rollout for r in expected.values())


def test_a_projects_key_does_not_open_another(server: StoreServer, other: dict[str, str]) -> None:
    answer = httpx.get(server.url + "/api/rollouts", headers={**other, "x-agentlightning-project": "one"})
    assert answer.status_code == 403
    own = httpx.get(server.url + "/api/rollouts", headers={**other, "x-agentlightning-project": "two"})
    assert own.status_code == 200


def test_the_servers_own_key_opens_every_project_by_name(server: StoreServer) -> None:
    with LightningClient(server.url, server.key, project="one") as client:
        assert {rollout.id for rollout in client.rollouts()} == {"secret", "waiting"}
    for name in ("UPPER", "", "a/b", "x" * 64):
        headers = {**server.headers, "x-agentlightning-project": name}
        assert httpx.get(server.url + "/api/rollouts", headers=headers).status_code == 400


def test_spans_sent_to_a_project_stay_in_it(server: StoreServer) -> None:
    headers = {**server.headers, "x-agentlightning-project": "three"}
    body = otlp.export_request([plain_span(501, "mine")])
    assert httpx.post(server.url + "/v1/traces", json=body, headers=headers).status_code == 200
    assert len(server.store.of("three").spans("mine")) == 1
    assert all(rollout.id != "mine" for rollout in server.store.rollouts())
