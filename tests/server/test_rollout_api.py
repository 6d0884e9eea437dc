from __future__ import annotations

import socket
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.support.stores import DATABASES, StoreServer, new_database, plain_span, queued, store_server
from tests.support.waiting import wait_until

from agentlightning.types import AttemptStatus, RolloutStatus, live_rollout_id
from agentlightning.wire import rollout_to_json


@pytest.fixture(scope="module", params=DATABASES)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[StoreServer]:
    folder = tmp_path_factory.mktemp("api")
    with store_server(folder, database=new_database(request.param, folder)) as running:
        yield running


def send(server: StoreServer, method: str, path: str, body: Any = None) -> httpx.Response:
    return httpx.request(method, server.url + path, json=body, headers=server.headers, timeout=70)


def post(server: StoreServer, path: str, body: Any) -> httpx.Response:
    return send(server, "POST", path, body)


def test_a_rollout_from_the_queue_to_its_end(server: StoreServer) -> None:
    created = post(server, "/api/rollouts", {"rollouts": [rollout_to_json(queued("whole"))]})
    assert created.status_code == 201
    (claim,) = post(server, "/api/claims", {"worker_id": "w", "max": 5}).json()["claims"]
    assert claim["rollout"]["task"]["input"] == {"question": "whole"}
    assert claim["model"] == "policy"
    attempt = claim["attempt"]["id"]
    assert post(server, f"/api/attempts/{attempt}/heartbeat", {"worker_id": "w"}).json() == {"cancel": False}
    report = {"worker_id": "w", "status": "succeeded", "rewards": [{"value": 1, "name": "reward"}]}
    assert post(server, f"/api/attempts/{attempt}/finish", report).status_code == 200
    found = send(server, "GET", "/api/rollouts/whole").json()
    assert found["rollout"]["status"] == "succeeded"
    assert [a["status"] for a in found["attempts"]] == ["succeeded"]
    (span,) = send(server, "GET", "/api/rollouts/whole/spans").json()["spans"]
    assert span["name"] == "reward"


def test_a_superseded_attempt_is_409(server: StoreServer) -> None:
    server.store.enqueue([queued("old")])
    server.store.claim("w")
    server.store.finish("old-1", "w", AttemptStatus.CANCELLED)
    for path, body in (("finish", {"status": "succeeded"}), ("heartbeat", {})):
        answer = post(server, f"/api/attempts/old-1/{path}", {"worker_id": "w", **body})
        assert answer.status_code == (409 if path == "finish" else 200)
    server.store.cancel(["old"])


def test_unknown_ids_are_404_in_openais_shape(server: StoreServer) -> None:
    for method, path, body in (
        ("GET", "/api/rollouts/nope", None),
        ("GET", "/api/rollouts/nope/spans", None),
        ("POST", "/api/rollouts/nope/cancel", {}),
        ("POST", "/api/rollouts/nope/rewards", {"value": 1}),
        ("POST", "/api/rollouts/wait", {"ids": ["nope"]}),
        ("POST", "/api/attempts/nope-1/heartbeat", {"worker_id": "w"}),
        ("POST", "/api/attempts/nope-1/finish", {"worker_id": "w", "status": "failed"}),
        ("GET", "/api/rollouts?after=nope", None),
        ("GET", "/nowhere", None),
    ):
        answer = send(server, method, path, body)
        assert answer.status_code == 404, path
        assert set(answer.json()["error"]) == {"message", "type", "code"}


@pytest.mark.parametrize("value", ["1", None, True, [1], {}])
def test_a_reward_that_is_no_number_is_422(server: StoreServer, value: Any) -> None:
    server.store.add_spans([plain_span(70)])
    path = f"/api/rollouts/{live_rollout_id(plain_span(70).trace_id)}/rewards"
    answer = post(server, path, {"value": value})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "invalid_reward"


@pytest.mark.parametrize(
    "text", ['{"value": NaN}', '{"value": 1e999}', '{"value": -Infinity}', "{", "", "[]"]
)
def test_numbers_that_json_does_not_have_are_refused(server: StoreServer, text: str) -> None:
    server.store.add_spans([plain_span(71)])
    url = f"{server.url}/api/rollouts/{live_rollout_id(plain_span(71).trace_id)}/rewards"
    answer = httpx.post(url, content=text, headers=server.headers)
    assert answer.status_code in (400, 422)


def test_a_reward_in_a_report_that_is_no_number_ends_nothing(server: StoreServer) -> None:
    server.store.enqueue([queued("bad-report")])
    server.store.claim("w", 50)
    report = {"worker_id": "w", "status": "succeeded", "rewards": [{"value": 1}, {"value": "much"}]}
    answer = post(server, "/api/attempts/bad-report-1/finish", report)
    assert answer.status_code == 422
    assert "rewards[1]" in answer.json()["error"]["message"]
    assert server.store.rollout("bad-report").status is RolloutStatus.RUNNING


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/rollouts", {"rollouts": []}),
        ("/api/rollouts", {"rollouts": [{"id": 3}]}),
        ("/api/rollouts", {"rollouts": [{"id": "a/b"}]}),
        ("/api/rollouts", {"rollouts": [{"id": "x", "mode": "fast"}]}),
        ("/api/rollouts", {"rollouts": [{"id": "x", "limits": {"max_attempts": 0}}]}),
        ("/api/rollouts", {"rollouts": [{"id": "x", "limits": {"start_to_close_s": -1}}]}),
        ("/api/rollouts", {"rollouts": [{"id": "x", "policy_version": 2**63}]}),
        ("/api/rollouts", {"rollouts": {"id": "x"}}),
        ("/api/rollouts", [1]),
        ("/api/rollouts/wait", {"ids": [1]}),
        ("/api/rollouts/wait", {"ids": "x"}),
        ("/api/claims", {}),
        ("/api/claims", {"worker_id": ""}),
        ("/api/claims", {"worker_id": "w", "max": 0}),
        ("/api/claims", {"worker_id": "w", "max": 10**9}),
        ("/api/claims", {"worker_id": "w", "wait_s": "long"}),
        ("/api/attempts/x/finish", {"worker_id": "w", "status": "running"}),
        ("/api/attempts/x/finish", {"worker_id": "w", "status": "great"}),
        ("/api/keys", {"scope": "attempt"}),
        ("/api/keys", {"scope": "all"}),
    ],
)
def test_bodies_that_make_no_sense_are_400_and_say_where(server: StoreServer, path: str, body: Any) -> None:
    answer = post(server, path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=99999", "status=odd", "mode=odd", "limit=²"])
def test_queries_that_make_no_sense_are_400(server: StoreServer, query: str) -> None:
    assert send(server, "GET", f"/api/rollouts?{query}").status_code == 400


def test_pages_and_filters(server: StoreServer) -> None:
    server.store.enqueue([queued(f"page{i}", run_id="paged") for i in range(5)])
    first = send(server, "GET", "/api/rollouts?run_id=paged&limit=3").json()["rollouts"]
    rest = send(server, "GET", f"/api/rollouts?run_id=paged&after={first[-1]['id']}").json()["rollouts"]
    assert [r["id"] for r in first + rest] == [f"page{i}" for i in range(5)]
    assert send(server, "GET", "/api/rollouts?run_id=paged&status=succeeded").json()["rollouts"] == []
    server.store.cancel([f"page{i}" for i in range(5)])


def test_a_claim_waits_for_work(server: StoreServer) -> None:
    server.store.claim("drain", 100)
    with ThreadPoolExecutor(4) as pool:
        polls = [
            pool.submit(post, server, "/api/claims", {"worker_id": f"w{i}", "wait_s": 30}) for i in range(4)
        ]
        server.store.enqueue([queued(f"wait{i}") for i in range(4)])
        claimed = [c["rollout"]["id"] for poll in polls for c in poll.result().json()["claims"]]
    assert sorted(claimed) == [f"wait{i}" for i in range(4)]


def test_a_claim_waits_no_longer_than_it_was_told(server: StoreServer) -> None:
    server.store.claim("drain", 100)
    assert post(server, "/api/claims", {"worker_id": "w", "wait_s": 0.2}).json() == {"claims": []}


def test_a_claim_sees_a_retry_when_its_delay_is_over(server: StoreServer) -> None:
    server.store.claim("drain", 100)
    server.store.enqueue([queued("retry")])
    server.store.claim("w")
    server.store.finish("retry-1", "w", AttemptStatus.FAILED, "once")
    (claim,) = post(server, "/api/claims", {"worker_id": "w", "wait_s": 20}).json()["claims"]
    assert claim["attempt"]["id"] == "retry-2"


def test_waiting_answers_as_soon_as_all_are_final(server: StoreServer) -> None:
    server.store.enqueue([queued("final1"), queued("final2")])
    server.store.claim("w", 100)
    server.store.finish("final1-1", "w", AttemptStatus.SUCCEEDED)
    early = post(server, "/api/rollouts/wait", {"ids": ["final1", "final2"], "timeout_s": 0.1})
    assert [r["id"] for r in early.json()["rollouts"]] == ["final1"]
    timer = threading.Timer(0.1, server.store.finish, ("final2-1", "w", AttemptStatus.SUCCEEDED))
    timer.start()
    both = post(server, "/api/rollouts/wait", {"ids": ["final1", "final2"], "timeout_s": 40})
    assert [r["id"] for r in both.json()["rollouts"]] == ["final1", "final2"]
    timer.join()


def test_leases_run_out_on_the_server_by_themselves(server: StoreServer) -> None:
    server.store.claim("drain", 100)
    server.store.enqueue([queued("leased", seconds=0.01, attempts=1)])
    server.store.claim("gone")
    sql = "UPDATE attempts SET lease_expires_ns = 1 WHERE id = 'leased-1'"
    server.store._submit(lambda write: write.connection.exec_driver_sql(sql)).result()  # pyright: ignore[reportPrivateUsage]
    (ended,) = server.store.wait(["leased"], 20)
    assert ended.status is RolloutStatus.FAILED


def test_work_claimed_for_a_worker_that_hung_up_goes_back(server: StoreServer) -> None:
    server.store.claim("drain", 100)
    host, port = server.url.removeprefix("http://").split(":")
    body = b'{"worker_id": "gone", "wait_s": 30}'
    head = f"POST /api/claims HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.store.waiting_for_work_count == 1)
    server.store.enqueue([queued("handed")])
    (claim,) = post(server, "/api/claims", {"worker_id": "here", "wait_s": 20}).json()["claims"]
    assert claim["rollout"]["id"] == "handed"


def test_wrong_methods_are_405_and_health_is_open(server: StoreServer) -> None:
    assert send(server, "DELETE", "/api/rollouts/x").status_code == 405
    assert httpx.get(server.url + "/healthz").json() == {"status": "ok"}
    assert httpx.get(server.url + "/readyz").status_code == 200
