"""What an operator sees: health, metrics, logs, traces of the server; and what must be in none of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.server_process import ServerProcess, server_process
from tests.support.stores import StoreServer, plain_span, queued, store_server
from tests.support.waiting import wait_until

from agentlightning import otlp
from agentlightning.errors import InvalidInput
from agentlightning.types import AttemptStatus
from agentlightning_server.auth import KeyScope
from agentlightning_server.observing import configure_logs, request_tracer
from agentlightning_server.observing.logs import masked

PROMPT = "a prompt that is nobody's business"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[StoreServer]:
    with store_server(tmp_path_factory.mktemp("operations")) as running:
        yield running


def metrics(server: StoreServer) -> dict[tuple[str, ...], float]:
    answer = httpx.get(server.url + "/metrics", headers=server.headers)
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_count_requests_by_route_and_say_how_the_store_stands(server: StoreServer) -> None:
    server.store.enqueue([queued("a"), queued("b")])
    server.store.claim("w")
    server.store.finish("a-1", "w", AttemptStatus.SUCCEEDED)
    for rollout_id in ("a", "b", "nowhere"):
        httpx.get(f"{server.url}/api/rollouts/{rollout_id}", headers=server.headers)
    httpx.get(f"{server.url}/api/rollouts/a")
    found = metrics(server)
    one = "agentlightning_http_requests_total", "method=GET", "route=/api/rollouts/{id}"
    assert found[(*one, "status=200")] == 2
    assert found[(*one, "status=404")] == 1
    refused = "agentlightning_http_requests_total", "method=GET", "route=unknown", "status=401"
    assert found[refused] == 1
    assert found[("agentlightning_rollouts", "project=default", "status=succeeded")] == 1
    assert found[("agentlightning_rollouts", "project=default", "status=queued")] == 1
    assert found[("agentlightning_store_up",)] == 1
    assert found[("agentlightning_store_commits_total",)] >= 3
    assert found[("agentlightning_http_request_seconds_count", "route=/api/rollouts/{id}")] == 3
    assert not any("nowhere" in "".join(key) for key in found)


def test_health_says_the_process_lives_and_readiness_that_it_can_work(tmp_path: Path) -> None:
    with store_server(tmp_path) as server:
        assert httpx.get(server.url + "/readyz").status_code == 200
        server.store.close()
        assert httpx.get(server.url + "/healthz").status_code == 200
        answer = httpx.get(server.url + "/readyz")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1


@pytest.fixture
def logged(tmp_path: Path) -> Generator[ServerProcess]:
    with server_process(tmp_path / "s.db", tmp_path, log_format="json", log_level="info") as running:
        yield running


def test_every_request_is_a_line_of_json_without_prompts_or_keys(logged: ServerProcess) -> None:
    with logged.client() as client:
        client.post("/api/rollouts", json={"rollouts": [{"id": "r", "task": {"id": "t", "input": PROMPT}}]})
        claim = client.post("/api/claims", json={"worker_id": "w"}).json()["claims"][0]
        own = {"Authorization": f"Bearer {claim['key']}"}
        body = otlp.export_request([plain_span(1, "r", attributes={"gen_ai.prompt": PROMPT})])
        client.post("/v1/traces", json=body, headers=own)
        client.get(f"/api/rollouts/{claim['key']}?after={claim['key']}")  # somebody's mistake
        client.get("/nowhere")
        client.post("/api/rollouts", content=PROMPT)
    assert logged.end() == 0
    text = logged.log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    requests = [
        (line["method"], line["route"], line["status"]) for line in lines if line["message"] == "request"
    ]
    assert requests == [
        ("POST", "/api/rollouts", 201),
        ("POST", "/api/claims", 200),
        ("POST", "/v1/traces", 200),
        ("GET", "/api/rollouts/{id}", 404),
        ("GET", "unknown", 404),
        ("POST", "/api/rollouts", 400),
    ]
    assert lines[2]["scope"] == "attempt"
    assert PROMPT not in text
    assert claim["key"] not in text
    assert "the admin's key" not in text


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_looks_like_a_key_is_masked_wherever_it_comes_from(
    form: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    key = "agl-attempt-" + "x" * 43
    try:
        configure_logs(form, "warning")
        logging.getLogger("other.package").warning("sent %s", key)
        try:
            raise ValueError(key)
        except ValueError:
            logging.getLogger("other.package").exception("failed")
    finally:
        root.handlers[:], root.level = handlers, level
    shown = capsys.readouterr().err
    assert key not in shown
    assert shown.count("agl-attempt-[masked]") >= 2
    assert masked("agl-runner-abc") == "agl-runner-abc"  # too short for a key


class _Collector:
    """Takes OTLP and keeps it."""

    def __init__(self) -> None:
        received: list[bytes] = []
        self.received = received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> _Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def test_the_servers_own_traces_go_to_the_operators_collector_and_say_no_more_than_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with server_process(tmp_path / "s.db", tmp_path, trace_server=True) as traced:
            with traced.client() as client:
                body = {"rollouts": [{"id": "r", "task": {"id": "t", "input": PROMPT}}]}
                client.post("/api/rollouts?secret=1", json=body)
            wait_until(lambda: bool(collector.received))
        request = ExportTraceServiceRequest.FromString(collector.received[0])
        (span,) = request.resource_spans[0].scope_spans[0].spans
        assert span.name == "POST /api/rollouts"
        assert span.end_time_unix_nano > span.start_time_unix_nano
        assert {pair.key for pair in span.attributes} == {
            "http.request.method",
            "http.route",
            "http.response.status_code",
        }
        with server_process(tmp_path / "s.db", tmp_path) as plain, plain.client() as client:
            # They are not among the agents' spans.
            assert [r["id"] for r in client.get("/api/rollouts").json()["rollouts"]] == ["r"]


def test_traces_without_a_collector_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    with pytest.raises(InvalidInput, match="OTEL_EXPORTER_OTLP_ENDPOINT"):
        request_tracer(True)
    assert request_tracer(False) is None


def test_keys_are_made_listed_revoked_and_end_by_themselves(server: StoreServer) -> None:
    key = server.client.mint_key("reporter", "dashboard")
    brief = server.client.mint_key("reporter", "brief", 0.2)
    server.store.enqueue([queued("rated")])
    body = {"value": 1.0}

    def status(one: str) -> int:
        headers = {"Authorization": f"Bearer {one}"}
        return httpx.post(f"{server.url}/api/rollouts/rated/rewards", json=body, headers=headers).status_code

    assert (status(key), status(brief)) == (201, 201)
    wait_until(lambda: status(brief) == 401, 5)
    found = {str(one["name"]): one for one in server.client.list_keys()}
    assert found["dashboard"]["scope"] == str(KeyScope.REPORTER)
    assert key not in json.dumps(list(found.values()))
    server.client.revoke_key(str(found["dashboard"]["id"]))
    assert status(key) == 401
