"""Several servers of one PostgreSQL database, each a process: what one commits, the others know."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tests.support.postgres import new_database
from tests.support.scale import scaled
from tests.support.server_process import ServerProcess, server_process
from tests.support.stores import plain_span, queued
from tests.support.waiting import wait_until

from agentlightning import otlp
from agentlightning.client import LightningClient
from agentlightning.types import AttemptStatus, Mode, RolloutStatus
from agentlightning_server.store import Store

KEY = "the admin's key"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[ServerProcess, ServerProcess]]:
    folder, database = tmp_path_factory.mktemp("several"), new_database()
    with server_process(database, folder) as one, server_process(database, folder) as two:
        yield one, two


@pytest.fixture
def clients(
    servers: tuple[ServerProcess, ServerProcess],
) -> Generator[tuple[LightningClient, LightningClient]]:
    with LightningClient(servers[0].url, KEY) as one, LightningClient(servers[1].url, KEY) as two:
        yield one, two


def test_each_rollout_is_claimed_once_whichever_server_is_asked(
    clients: tuple[LightningClient, LightningClient],
) -> None:
    ids = [f"once{i}" for i in range(scaled(300, 10_000))]
    clients[0].enqueue([queued(i) for i in ids])

    def claim_all(worker: int) -> list[str]:
        claimed: list[str] = []
        while claims := clients[worker % 2].claim(f"w{worker}", 7):
            claimed += [claim.rollout.id for claim in claims]
        return claimed

    with ThreadPoolExecutor(16) as pool:
        claimed = [rollout_id for part in pool.map(claim_all, range(16)) for rollout_id in part]
    assert sorted(claimed) == sorted(ids)


def test_a_worker_that_waits_at_one_server_gets_what_is_queued_at_the_other(
    clients: tuple[LightningClient, LightningClient],
) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(clients[0].claim, "waiting", 1, 20.0)
        time.sleep(0.3)  # for the poll to have arrived
        began = time.monotonic()
        clients[1].enqueue([queued("handed-over")])
        assert [claim.rollout.id for claim in waiting.result(30)] == ["handed-over"]
        assert time.monotonic() - began < 5


def test_who_waits_at_one_server_hears_of_the_end_at_the_other(
    clients: tuple[LightningClient, LightningClient],
) -> None:
    clients[0].enqueue([queued("ends-elsewhere")])
    (claim,) = clients[1].claim("w")
    finish = threading.Timer(0.3, clients[1].finish, (claim.attempt.id, "w", AttemptStatus.SUCCEEDED))
    finish.start()
    began = time.monotonic()
    (ended,) = clients[0].wait(["ends-elsewhere"], 20)
    assert ended.status is RolloutStatus.SUCCEEDED
    assert time.monotonic() - began < 5
    finish.join()


def test_an_attempt_that_ends_at_one_server_has_no_key_at_the_other(
    servers: tuple[ServerProcess, ServerProcess], clients: tuple[LightningClient, LightningClient]
) -> None:
    clients[0].enqueue([queued("keyed")])
    (claim,) = clients[0].claim("w")
    headers = {"Authorization": f"Bearer {claim.key}"}
    for server in servers:  # both have it in their cache now
        assert httpx.post(server.url + "/v1/traces", json={}, headers=headers).status_code == 200
    clients[0].finish(claim.attempt.id, "w", AttemptStatus.SUCCEEDED)

    def refused() -> bool:
        return httpx.post(servers[1].url + "/v1/traces", json={}, headers=headers).status_code == 401

    wait_until(refused, 5)


def test_a_revoked_key_is_refused_by_all(
    servers: tuple[ServerProcess, ServerProcess], clients: tuple[LightningClient, LightningClient]
) -> None:
    key = clients[0].mint_key("trainer", "to be revoked")
    headers = {"Authorization": f"Bearer {key}"}
    for server in servers:
        assert httpx.get(server.url + "/api/rollouts", headers=headers).status_code == 200
    (made,) = [one for one in clients[1].list_keys() if one["name"] == "to be revoked"]
    clients[1].revoke_key(str(made["id"]))
    wait_until(lambda: httpx.get(servers[0].url + "/api/rollouts", headers=headers).status_code == 401, 5)


def test_the_same_spans_at_both_servers_are_stored_once(
    servers: tuple[ServerProcess, ServerProcess], clients: tuple[LightningClient, LightningClient]
) -> None:
    body = otlp.export_request([plain_span(10_000 + i, "shared-spans") for i in range(50)])

    def send(number: int) -> int:
        with servers[number % 2].client() as client:
            return client.post("/v1/traces", json=body).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(send, range(24))) == {200}
    assert len(clients[1].spans("shared-spans")) == 50


def test_a_server_that_is_killed_leaves_the_others_and_its_work_to_them(tmp_path: Path) -> None:
    database = new_database()
    with server_process(database, tmp_path) as kept, server_process(database, tmp_path) as killed:
        with LightningClient(killed.url, KEY) as client:
            client.enqueue([queued("survives")])
            (claim,) = client.claim("w")
        killed.kill()
        with LightningClient(kept.url, KEY) as client:
            assert client.heartbeat(claim.attempt.id, "w") is False
            client.finish(claim.attempt.id, "w", AttemptStatus.SUCCEEDED)
            assert client.rollout("survives")[0].status is RolloutStatus.SUCCEEDED


def test_a_database_server_that_restarts_is_an_interruption_and_no_more(tmp_path: Path) -> None:
    database = new_database()
    with Store(database) as store:
        store.enqueue([queued("before")])
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        cut += " AND datname = current_database()"
        with store.reading() as connection:
            connection.exec_driver_sql(cut)
        wait_until(lambda: _enqueued(store, "after"))
        assert {rollout.id for rollout in store.rollouts()} == {"before", "after"}
        key = store.claim("w")[0].key
        wait_until(lambda: store.principal(key) is not None and store.cached_principal(key) is not None)


def _enqueued(store: Store, rollout_id: str) -> bool:
    from agentlightning.errors import StoreError

    try:
        store.enqueue([queued(rollout_id, mode=Mode.TRAIN)])
    except StoreError:
        return False
    return True
