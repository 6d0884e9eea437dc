"""Durable ingest and the queue over HTTP: a real server process, committing with fsync before it answers.

The clients share the machine with the server; on two cores they take about half of it.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agentlightning import semconv

SERVER = """
import sys
from pathlib import Path
from agentlightning_server.app import bind, create_app, serve, url_of
from agentlightning_server.settings import Settings
from agentlightning_server.store import Store

settings = Settings(database=Path(sys.argv[1]) / "store.db", admin_key="key")
with Store(settings.database) as store:
    sock = bind("127.0.0.1", 0)
    print(url_of(sock), flush=True)
    serve(create_app(store, settings=settings), sock)
"""
CONNECTIONS = 8
BATCH = 64  # spans a request; what exporters send is 1 to 512
REPEATS = 3
ROLLOUTS = 600


def run() -> dict[str, float]:
    """Spans and rollouts per second, medians of 3."""
    with _server() as url:
        warm = span_bodies(8, 100, "warm")
        _spans_per_s(url, warm)
        small = [_spans_per_s(url, span_bodies(200, 100, f"s{i}")) for i in range(REPEATS)]
        large = [_spans_per_s(url, span_bodies(60, 6000, f"l{i}")) for i in range(REPEATS)]
        single = [_spans_per_s(url, span_bodies(600, 100, f"o{i}", batch=1)) for i in range(REPEATS)]
        queue = [_rollouts_per_s(url, f"q{i}") for i in range(REPEATS)]
    return {
        "durable_spans_per_s_small": _median(small),
        "durable_spans_per_s_6kb": _median(large),
        "durable_spans_per_s_one_a_request": _median(single),
        "rollouts_claimed_and_finished_per_s": _median(queue),
    }


@contextmanager
def _server() -> Generator[str]:
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, "-c", SERVER, folder], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


def span_bodies(count: int, payload: int, rollout_id: str, batch: int = BATCH) -> list[bytes]:
    """Requests of spans of one rollout with 6 attributes and a text of `payload` bytes."""
    bodies: list[bytes] = []
    seed = abs(hash(rollout_id)) % 2**40
    for number in range(count):
        request = ExportTraceServiceRequest()
        group = request.resource_spans.add()
        group.resource.attributes.add(key=semconv.ROLLOUT_ID).value.string_value = rollout_id
        spans = group.scope_spans.add().spans
        for i in range(batch):
            identity = (seed << 20) + number * batch + i + 1
            span = spans.add(trace_id=identity.to_bytes(16, "big"), span_id=identity.to_bytes(8, "big"))
            span.name, span.start_time_unix_nano, span.end_time_unix_nano = "chat", 1, 2
            span.parent_span_id = b"parent.."
            for name in (semconv.REQUEST_MODEL, semconv.OPERATION, semconv.AGENT_NAME, semconv.RESPONSE_ID):
                span.attributes.add(key=name).value.string_value = "some value"
            span.attributes.add(key=semconv.USAGE_INPUT).value.int_value = 100
            span.attributes.add(key=semconv.INPUT_MESSAGES).value.string_value = "x" * payload
        bodies.append(request.SerializeToString())
    return bodies


class Connection:
    """One kept-alive connection with the server's key."""

    def __init__(self, url: str) -> None:
        self._http = http.client.HTTPConnection(urlsplit(url).netloc)

    def post(self, path: str, body: bytes, kind: str) -> bytes:
        """The answer's body; anything but success raises."""
        self._http.request("POST", path, body, {"Authorization": "Bearer key", "Content-Type": kind})
        answer = self._http.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{path}: {answer.status} {content[:200]!r}")
        return content

    def call(self, path: str, body: Any) -> Any:
        """As `post`, in JSON."""
        return json.loads(self.post(path, json.dumps(body).encode(), "application/json"))


def _spans_per_s(url: str, bodies: Sequence[bytes]) -> float:
    batch = len(ExportTraceServiceRequest.FromString(bodies[0]).resource_spans[0].scope_spans[0].spans)

    def send(connection: Connection, index: int) -> None:
        for body in bodies[index::CONNECTIONS]:
            connection.post("/v1/traces", body, "application/x-protobuf")

    return len(bodies) * batch / _time(url, send)


def _rollouts_per_s(url: str, prefix: str) -> float:
    rollouts = [{"id": f"{prefix}-{i}", "task": {"id": "t", "input": {"q": i}}} for i in range(ROLLOUTS)]
    Connection(url).call("/api/rollouts", {"rollouts": rollouts})

    def work(connection: Connection, index: int) -> None:
        worker = f"w{index}"
        while claims := connection.call("/api/claims", {"worker_id": worker, "max": 4})["claims"]:
            for claim in claims:
                report = {"worker_id": worker, "status": "succeeded", "rewards": [{"value": 1.0}]}
                connection.call(f"/api/attempts/{claim['attempt']['id']}/finish", report)

    return ROLLOUTS / _time(url, work)


def _time(url: str, work: Callable[[Connection, int], None]) -> float:
    threads = [threading.Thread(target=work, args=(Connection(url), index)) for index in range(CONNECTIONS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
