"""Ingest, queue and gateway of a real server process, each beside a bare prototype of the same work.

The prototypes do the least that the work needs, without keys, scopes, limits or identity: a raw ASGI app that
parses spans and commits them to SQLite, and one that passes a call on and keeps what was said in memory.
Numbers are per second of the server's CPU time, on one core.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from tests.bench.bench_store import Connection, span_bodies
from tests.bench.loads import Measured, http_request, load, process

SPANS_A_REQUEST = 20
INGEST_REQUESTS = 2000
GATEWAY_REQUESTS = 3000
ROLLOUTS = 400
WORKERS = 8
REPEATS = 3
PROTOBUF = "application/x-protobuf"

_OURS = """
import asyncio, json, sys
from pathlib import Path
from types import SimpleNamespace
from agentlightning_server.app import bind, create_app, serve, url_of
from agentlightning_server.gateway import Gateway, Upstreams, gateway_routes, load_upstreams
from agentlightning_server.settings import Settings
from agentlightning_server.store import Store

folder, upstream = Path(sys.argv[1]), sys.argv[2]
settings = Settings(database=folder / "store.db", admin_key="key")
table = folder / "upstreams.json"
table.write_text(json.dumps({"hosted": {"url": upstream}}))
tokenizer = SimpleNamespace(chat_template=None, eos_token="", eos_token_id=0)
engine = SimpleNamespace(policies=(), base_model="none", tokenizer=tokenizer, eos_ids=frozenset())
with Store(settings.database) as store:
    async def record(project, spans):
        await asyncio.wrap_future(store.of(project).submit_spans(spans))

    upstreams = Upstreams(load_upstreams(table))
    routes = gateway_routes(Gateway(engine, record, None, upstreams))
    app = create_app(store, gateway=routes, settings=settings, on_stop=upstreams.close)
    sock = bind("127.0.0.1", 0)
    print(url_of(sock), flush=True)
    serve(app, sock)
"""
_BARE_SERVE = """
import socket, sys, threading
import uvicorn

def serve(app):
    sock = socket.create_server(("127.0.0.1", 0))
    print("http://127.0.0.1:%d" % sock.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[sock])

async def body_of(receive):
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)

async def answer(send, body, kind=b"application/json"):
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""
_BARE_INGEST = (
    _BARE_SERVE
    + """
import asyncio, queue, sqlite3
from concurrent.futures import Future
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

waiting = queue.SimpleQueue()

def write():
    database = sqlite3.connect(sys.argv[1] + "/bare.db", isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        database.execute("PRAGMA " + pragma)
    database.execute("CREATE TABLE spans (trace BLOB, span BLOB, name TEXT, start INT, body BLOB)")
    database.execute("CREATE UNIQUE INDEX by_id ON spans (trace, span)")
    while True:
        items = [waiting.get()]
        while not waiting.empty():
            items.append(waiting.get())
        database.execute("BEGIN IMMEDIATE")
        for rows, _ in items:
            database.executemany("INSERT OR IGNORE INTO spans VALUES (?, ?, ?, ?, ?)", rows)
        database.execute("COMMIT")
        for _, done in items:
            done.set_result(None)

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    request = ExportTraceServiceRequest.FromString(await body_of(receive))
    rows = [
        (s.trace_id, s.span_id, s.name, s.start_time_unix_nano, s.SerializeToString())
        for group in request.resource_spans for scoped in group.scope_spans for s in scoped.spans
    ]
    done = Future()
    waiting.put((rows, done))
    await asyncio.wrap_future(done)
    await answer(send, b"", b"application/x-protobuf")

threading.Thread(target=write, daemon=True).start()
serve(app)
"""
)
_BARE_GATEWAY = (
    _BARE_SERVE
    + """
import aiohttp, orjson

kept, session = [], None

async def app(scope, receive, send):
    global session
    if scope["type"] != "http":
        return
    fields = orjson.loads(await body_of(receive))
    if session is None:
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    async with session.post(sys.argv[2] + "/chat/completions", data=orjson.dumps(fields)) as response:
        text = await response.read()
    body = orjson.loads(text)
    kept.append((fields["messages"], body["choices"][0]["message"], body["choices"][0].get("token_ids")))
    await answer(send, text)

serve(app)
"""
)
_UPSTREAM = (
    _BARE_SERVE
    + """
import orjson

tokens = list(range(1000, 1256))
choice = {
    "index": 0,
    "finish_reason": "stop",
    "message": {"role": "assistant", "content": "word " * 256},
    "token_ids": tokens,
    "logprobs": {"content": [{"token": "word", "logprob": -0.5} for _ in tokens[:128]]},
}
body = orjson.dumps({
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "big", "choices": [choice],
    "usage": {"prompt_tokens": 100, "completion_tokens": 256, "total_tokens": 356},
})

async def app(scope, receive, send):
    if scope["type"] == "http":
        await body_of(receive)
        await answer(send, body)

serve(app)
"""
)


def run() -> dict[str, float]:
    """Spans, rollouts and requests per second of server CPU; the gateway's added time at one connection."""
    return {**_ingest(), **_queue(), **_gateway()}


@contextmanager
def _serving(script: str, upstream: str = "http://127.0.0.1:9/v1") -> Generator[tuple[str, int]]:
    with tempfile.TemporaryDirectory() as folder, process(script, folder, upstream) as running:
        yield running


def _ingest() -> dict[str, float]:
    rates: dict[str, list[float]] = {"ours": [], "bare": []}
    for number in range(REPEATS):
        for name, script in (("bare", _BARE_INGEST), ("ours", _OURS)):
            with _serving(script) as (url, pid):
                bodies = span_bodies(INGEST_REQUESTS + 50, 300, f"i{number}", batch=SPANS_A_REQUEST)
                sent = [http_request("/v1/traces", body, PROTOBUF) for body in bodies]
                load(url, pid, sent[:50], WORKERS)  # warm
                rates[name].append(load(url, pid, sent[50:], WORKERS).per_cpu_second * SPANS_A_REQUEST)
    ours, bare = statistics.median(rates["ours"]), statistics.median(rates["bare"])
    return {"spans_per_cpu_s": ours, "bare_spans_per_cpu_s": bare, "spans_ours_over_bare": ours / bare}


def _queue() -> dict[str, float]:
    """Enqueue, claim, 20 spans and a reward, complete: with 8 workers."""
    with _serving(_OURS) as (url, pid):
        rollouts: list[dict[str, Any]] = [
            {"id": f"q{i}", "task": {"id": "t", "input": {"q": i}}} for i in range(ROLLOUTS)
        ]
        spans = dict(zip((r["id"] for r in rollouts), span_bodies_by_rollout(rollouts), strict=True))
        measured = _work(url, pid, rollouts, spans)
    return {
        "rollouts_per_s": measured.per_second,
        "rollouts_per_cpu_s": measured.per_cpu_second,
    }


def span_bodies_by_rollout(rollouts: list[dict[str, Any]]) -> list[bytes]:
    """One request of 20 spans for each."""
    return [span_bodies(1, 300, rollout["id"], batch=SPANS_A_REQUEST)[0] for rollout in rollouts]


def _work(url: str, pid: int, rollouts: list[dict[str, Any]], spans: dict[str, bytes]) -> Measured:
    import time

    from tests.bench.loads import cpu_seconds

    def work(index: int) -> None:
        connection, worker = Connection(url), f"w{index}"
        while claims := connection.call("/api/claims", {"worker_id": worker, "max": 4})["claims"]:
            for claim in claims:
                connection.post("/v1/traces", spans[claim["rollout"]["id"]], PROTOBUF)
                report = {"worker_id": worker, "status": "succeeded", "rewards": [{"value": 1.0}]}
                connection.call(f"/api/attempts/{claim['attempt']['id']}/finish", report)

    began, began_cpu = time.perf_counter(), cpu_seconds(pid)
    for start in range(0, len(rollouts), 100):
        Connection(url).call("/api/rollouts", {"rollouts": rollouts[start : start + 100]})
    threads = [threading.Thread(target=work, args=(index,)) for index in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Measured(len(rollouts), time.perf_counter() - began, cpu_seconds(pid) - began_cpu, 0.0)


def _gateway() -> dict[str, float]:
    found: dict[str, list[float]] = {}
    with process(_UPSTREAM) as (endpoint, endpoint_pid):
        upstream = f"{endpoint}/v1"
        for _ in range(REPEATS):
            direct = load(endpoint, endpoint_pid, _calls("/v1/chat/completions", 200, stream=False), 1)
            for name, script in (("bare", _BARE_GATEWAY), ("ours", _OURS)):
                with _serving(script, upstream) as (url, pid):
                    _calls_of(name, url, pid, direct.median_ms, found)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        **medians,
        "gateway_ours_over_bare": medians["ours_plain_per_cpu_s"] / medians["bare_plain_per_cpu_s"],
    }


def _calls_of(name: str, url: str, pid: int, direct_ms: float, found: dict[str, list[float]]) -> None:
    path = "/v1/chat/completions" if name == "bare" else "/rollouts/b/attempts/b-1/v1/chat/completions"
    load(url, pid, _calls(path, 100, stream=False), WORKERS)  # warm
    plain = load(url, pid, _calls(path, GATEWAY_REQUESTS, stream=False), WORKERS)
    alone = load(url, pid, _calls(path, 200, stream=False), 1)
    found.setdefault(f"{name}_plain_per_cpu_s", []).append(plain.per_cpu_second)
    found.setdefault(f"{name}_plain_per_s", []).append(plain.per_second)
    found.setdefault(f"{name}_added_ms_p50", []).append(alone.median_ms - direct_ms)
    if name == "ours":
        streamed = load(url, pid, _calls(path, GATEWAY_REQUESTS, stream=True), WORKERS)
        found.setdefault(f"{name}_streamed_per_cpu_s", []).append(streamed.per_cpu_second)
        found.setdefault(f"{name}_streamed_per_s", []).append(streamed.per_second)


def _calls(path: str, count: int, *, stream: bool) -> list[bytes]:
    body = {"model": "hosted", "messages": [{"role": "user", "content": "hello " * 40}], "stream": stream}
    return [http_request(path, json.dumps(body).encode())] * count


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
