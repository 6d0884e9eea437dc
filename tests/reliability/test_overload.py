"""More than the server can write: it says so, keeps its memory, and loses nothing it acknowledged (R7)."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tests.support.scale import scaled
from tests.support.server_process import ServerProcess, server_process
from tests.support.stores import DATABASES, new_database, plain_span

from agentlightning import otlp
from agentlightning_server.store import Store

WRITERS = scaled(24, 64)
SECONDS = scaled(4.0, 60.0)
BATCH = 20
MAX_PENDING = 6  # requests that may wait: far fewer than there are writers


@pytest.mark.parametrize("kind", DATABASES)
def test_twice_the_load_is_answered_with_when_to_come_back(tmp_path: Path, kind: str) -> None:
    database = new_database(kind, tmp_path)
    with server_process(database, tmp_path, store={"max_pending": MAX_PENDING}) as server:
        began = time.monotonic()
        numbers = iter(range(0, 10**9, BATCH))

        def write(_writer: int) -> tuple[list[int], int, list[float]]:
            acknowledged: list[int] = []
            taken: list[float] = []
            refused = 0
            with server.client() as client:
                while time.monotonic() - began < SECONDS:
                    batch = next(numbers)
                    spans = [plain_span(batch + i, "busy", attributes={"t": "x" * 300}) for i in range(BATCH)]
                    body = otlp.export_request(spans)
                    while True:  # as exporters do: again, until it is taken
                        asked = time.monotonic()
                        answer = client.post("/v1/traces", json=body)
                        if answer.status_code == 200:
                            taken.append(time.monotonic() - asked)
                            acknowledged.append(batch)
                            break
                        assert answer.status_code == 503
                        assert int(answer.headers["retry-after"]) >= 1
                        refused += 1
                        time.sleep(0.05)
            return acknowledged, refused, taken

        with ThreadPoolExecutor(WRITERS) as pool:
            writing = [pool.submit(write, number) for number in range(WRITERS)]
            time.sleep(SECONDS / 2)
            halfway = server.resident_kib
            results = [one.result() for one in writing]
        assert server.resident_kib < 1.1 * halfway + 8 * 1024
        assert sum(refused for _, refused, _ in results) > 0, "this was no overload"
        acknowledged = [batch for batches, *_ in results for batch in batches]
        _check(server, [seconds for *_, taken in results for seconds in taken])
    with Store(database) as store:
        stored = {int(span.span_id, 16) - 1 for span in store.spans("busy")}
    assert stored >= {batch + i for batch in acknowledged for i in range(BATCH)}


def _check(server: ServerProcess, taken: list[float]) -> None:
    """It is well afterwards, and what it took, it took in time."""
    assert httpx.get(server.url + "/readyz").status_code == 200
    taken.sort()
    assert taken[int(0.99 * len(taken))] < scaled(5.0, 1.0)  # a loaded machine that runs tests is no measure
