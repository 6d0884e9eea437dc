from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from tests.support.stores import plain_span

from agentlightning import otlp
from agentlightning.types import live_rollout_id
from agentlightning_server.store import Store

SERVER = """
import sys
from pathlib import Path
from agentlightning_server.app import bind, create_app, serve, url_of
from agentlightning_server.settings import Settings
from agentlightning_server.store import Store

settings = Settings(database=Path(sys.argv[1]), admin_key="key", durability=sys.argv[2])
store = Store(settings.database, durability=settings.durability)
sock = bind("127.0.0.1", 0)
print(url_of(sock), flush=True)
serve(create_app(store, settings=settings), sock)
store.close()
"""
WRITERS = 3
ENOUGH = 60  # batches acknowledged before the kill
BATCH = 8


def start(database: Path, durability: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(database), durability], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_killing_the_server_loses_no_acknowledged_span(tmp_path: Path, durability: str) -> None:
    database = tmp_path / "store.db"
    acknowledged: list[int] = []
    number = iter(range(10**9))
    for trial in range(3):
        process, url = start(database, durability)
        goal = len(acknowledged) + ENOUGH * BATCH
        reached = threading.Event()

        def write(url: str = url, goal: int = goal, reached: threading.Event = reached) -> None:
            with httpx.Client(base_url=url, headers={"Authorization": "Bearer key"}) as client:
                while True:
                    ids = [next(number) for _ in range(BATCH)]
                    body = otlp.export_request([plain_span(i, attributes={"t": "x" * 300}) for i in ids])
                    try:
                        answer = client.post("/v1/traces", json=body, timeout=20)
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
        process.kill()
        process.wait()
        for writer in writers:
            writer.join()
        assert process.stdout is not None
        process.stdout.close()
    began = time.monotonic()
    with Store(database) as store:
        assert time.monotonic() - began < 2.0
        lost = [i for i in acknowledged if not store.spans(live_rollout_id(f"{i + 1:032x}"))]
    assert len(acknowledged) >= 3 * ENOUGH * BATCH
    assert lost == []


def test_sigterm_finishes_the_requests_under_way_and_exits_cleanly(tmp_path: Path) -> None:
    process, url = start(tmp_path / "store.db", "full")
    headers = {"Authorization": "Bearer key"}
    polled: list[httpx.Response] = []
    asked = threading.Event()

    def poll() -> None:
        asked.set()
        body = {"worker_id": "w", "wait_s": 50}
        polled.append(httpx.post(url + "/api/claims", json=body, headers=headers, timeout=60))

    waiting = threading.Thread(target=poll)
    while httpx.get(url + "/healthz").status_code != 200:
        pass
    waiting.start()
    asked.wait()
    time.sleep(0.3)  # for the poll to have arrived; the server tells nobody that it waits
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    waiting.join(20)
    assert process.wait(20) == 0
    assert time.monotonic() - began < 8
    assert polled[0].status_code in (200, 503)
    assert process.stdout is not None
    process.stdout.close()
