"""Servers that are killed, told to end, or left without their database (R1, R12, R14)."""

from __future__ import annotations

import socket
import sqlite3
import threading
import time
from pathlib import Path

import httpx
import pytest
from tests.support.scale import scaled
from tests.support.server_process import ServerProcess, server_process
from tests.support.stores import new_database, plain_span

from agentlightning import otlp
from agentlightning.types import live_rollout_id
from agentlightning_server.settings import Durability
from agentlightning_server.store import Store
from agentlightning_server.store.maintenance import problems

TRIALS = scaled(3, 20)
WRITERS = 3
ENOUGH = 60  # batches acknowledged before the kill
BATCH = 8


@pytest.mark.parametrize(
    ("kind", "durability"), [("sqlite", "full"), ("sqlite", "normal"), ("postgresql", "full")]
)
def test_killing_the_server_loses_no_acknowledged_span(
    tmp_path: Path, kind: str, durability: Durability
) -> None:
    database = new_database(kind, tmp_path)
    acknowledged: list[int] = []
    number = iter(range(10**9))
    for trial in range(TRIALS):
        with server_process(database, tmp_path, durability=durability) as server:
            goal = len(acknowledged) + ENOUGH * BATCH
            reached = threading.Event()

            def write(
                server: ServerProcess = server, goal: int = goal, reached: threading.Event = reached
            ) -> None:
                with server.client() as client:
                    while True:
                        ids = [next(number) for _ in range(BATCH)]
                        body = otlp.export_request([plain_span(i, attributes={"t": "x" * 300}) for i in ids])
                        try:
                            answer = client.post("/v1/traces", json=body)
                        except httpx.TransportError:
                            return
                        assert answer.status_code == 200
                        acknowledged.extend(ids)
                        if len(acknowledged) >= goal:
                            reached.set()

            writers = [threading.Thread(target=write) for _ in range(WRITERS)]
            for writer in writers:
                writer.start()
            assert reached.wait(60), f"trial {trial}: too slow"
            server.kill()
            for writer in writers:
                writer.join()
    began = time.monotonic()
    with Store(database) as store:
        assert time.monotonic() - began < 2.0
        assert problems(store) == []
        lost = [i for i in acknowledged if not store.spans(live_rollout_id(f"{i + 1:032x}"))]
    assert len(acknowledged) >= TRIALS * ENOUGH * BATCH
    assert lost == []


def test_sigterm_finishes_the_requests_under_way_and_exits_cleanly(tmp_path: Path) -> None:
    with server_process(tmp_path / "store.db", tmp_path) as server:
        polled: list[httpx.Response] = []
        asked = threading.Event()

        def poll() -> None:
            with server.client() as client:
                asked.set()
                polled.append(client.post("/api/claims", json={"worker_id": "w", "wait_s": 25}))

        waiting = threading.Thread(target=poll)
        waiting.start()
        asked.wait()
        time.sleep(0.5)  # for the poll to have arrived; the server tells nobody that it waits
        began = time.monotonic()
        assert server.end() == 0
        waiting.join(20)
        assert time.monotonic() - began < 8
        assert polled[0].status_code in (200, 503)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with server_process(tmp_path / "store.db", tmp_path) as server:
        with socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port or 0)) as held:
            # A request whose body never comes would hold a graceful end up for its ten seconds.
            head = "POST /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            head += f"Authorization: {server.headers['Authorization']}\r\nContent-Length: 100\r\n\r\n"
            held.sendall(head.encode() + b"{")
            time.sleep(0.3)
            server.process.terminate()
            time.sleep(0.5)
            began = time.monotonic()
            server.process.terminate()
            server.process.wait(20)
        assert time.monotonic() - began < 4


def test_a_database_that_cannot_be_written_acknowledges_nothing_and_says_why(tmp_path: Path) -> None:
    with server_process(tmp_path / "store.db", tmp_path) as server, server.client() as client:
        first = otlp.export_request([plain_span(1)])
        assert client.post("/v1/traces", json=first).status_code == 200
        # Another process holds the only write lock for longer than the server waits.
        with sqlite3.connect(tmp_path / "store.db", isolation_level=None) as locker:
            locker.execute("BEGIN IMMEDIATE")
            answer = client.post("/v1/traces", json=otlp.export_request([plain_span(2)]))
            locker.execute("ROLLBACK")
        locker.close()
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "10"
        assert "nothing of this request was stored" in answer.json()["error"]["message"]
        assert client.post("/v1/traces", json=otlp.export_request([plain_span(2)])).status_code == 200
