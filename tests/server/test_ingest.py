from __future__ import annotations

import gzip
import random
import resource
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1 import trace_pb2 as pb
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import format_trace_id
from tests.support.scale import scaled
from tests.support.stores import StoreServer, blocked, plain_span, queued, store_server
from tests.support.waiting import wait_until

from agentlightning import otlp, semconv
from agentlightning.errors import InvalidSpans
from agentlightning.types import RolloutStatus, live_rollout_id
from agentlightning_server.otlp_pb import rows_from_request

PROTOBUF = "application/x-protobuf"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[StoreServer]:
    with store_server(tmp_path_factory.mktemp("ingest")) as running:
        yield running


def request_of(*spans: pb.Span, resource: dict[str, str] | None = None) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    for name, value in (resource or {}).items():
        group.resource.attributes.add(key=name).value.string_value = value
    group.scope_spans.add(spans=spans).scope.name = "theirs"
    return request


def span(number: int, **attributes: str) -> pb.Span:
    made = pb.Span(
        trace_id=number.to_bytes(16, "big"),
        span_id=number.to_bytes(8, "big"),
        name="work",
        start_time_unix_nano=number,
        end_time_unix_nano=number + 5,
    )
    for name, value in attributes.items():
        made.attributes.add(key=name.replace("_", ".")).value.string_value = value
    return made


def post(
    server: StoreServer, body: bytes, content_type: str = PROTOBUF, path: str = "/v1/traces", **headers: str
) -> httpx.Response:
    sent = {**server.headers, "Content-Type": content_type, **headers}
    return httpx.post(server.url + path, content=body, headers=sent)


def stored(server: StoreServer, number: int) -> list[str]:
    return [s.name for s in server.store.spans(live_rollout_id(f"{number:032x}"))]


# --- what is taken -------------------------------------------------------------------------------


def test_protobuf_is_stored_before_the_answer(server: StoreServer) -> None:
    answer = post(server, request_of(span(1)).SerializeToString())
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == PROTOBUF
    assert stored(server, 1) == ["work"]


def test_gzip_in_one_and_in_two_members(server: StoreServer) -> None:
    body = request_of(span(2)).SerializeToString()
    whole = post(server, gzip.compress(body), **{"Content-Encoding": "gzip"})
    body = request_of(span(3)).SerializeToString()
    halves = gzip.compress(body[:20]) + gzip.compress(body[20:])
    split = post(server, halves, **{"Content-Encoding": "gzip"})
    assert (whole.status_code, split.status_code) == (200, 200)
    assert stored(server, 2) == stored(server, 3) == ["work"]


def test_json_is_answered_in_json(server: StoreServer) -> None:
    sent = plain_span(4000, attributes={"ids": b"\x01\x00\x00\x00", "deep": {"a": [1, None]}})
    answer = httpx.post(server.url + "/v1/traces", json=otlp.export_request([sent]), headers=server.headers)
    assert (answer.status_code, answer.json()) == (200, {})
    (found,) = server.store.spans(live_rollout_id(sent.trace_id))
    assert found.attributes == sent.attributes


def test_a_body_without_spans_is_fine(server: StoreServer) -> None:
    assert post(server, b"").status_code == 200
    assert post(server, b"{}", "application/json").status_code == 200


def test_sending_again_changes_nothing(server: StoreServer) -> None:
    body = request_of(
        *(span(100 + i, agentlightning_rollout_id="again") for i in range(20))
    ).SerializeToString()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post, server, body) for _ in range(24)]
    assert {answer.result().status_code for answer in answers} == {200}
    assert len(server.store.spans("again")) == 20


def test_foreign_spans_keep_resource_scope_and_bytes(server: StoreServer) -> None:
    made = span(5)
    made.attributes.add(key="ids").value.bytes_value = bytes(range(256))
    made.attributes.add(key="empty")
    post(server, request_of(made, resource={"service.name": "app"}).SerializeToString())
    (found,) = server.store.spans(live_rollout_id(f"{5:032x}"))
    assert (found.resource, found.scope) == ({"service.name": "app"}, "theirs")
    assert found.attributes == {"ids": bytes(range(256)), "empty": None}


def test_opentelemetrys_own_exporter_delivers(server: StoreServer) -> None:
    exporter = OTLPSpanExporter(
        server.url + "/v1/traces", headers=server.headers, compression=Compression.Gzip
    )
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("app").start_as_current_span("outer", attributes={"ids": (1, 2)}) as outer:
        pass
    provider.shutdown()
    (found,) = server.store.spans(live_rollout_id(format_trace_id(outer.get_span_context().trace_id)))
    assert (found.name, found.scope, found.attributes) == ("outer", "app", {"ids": [1, 2]})


# --- whose spans they are ------------------------------------------------------------------------


def test_the_span_decides_then_the_resource_then_the_url(server: StoreServer) -> None:
    server.store.enqueue([queued(f"own-{name}") for name in ("span", "resource", "url")])
    server.store.claim("w", 10)
    body = request_of(
        span(11, agentlightning_rollout_id="own-span", agentlightning_attempt_id="own-span-1"),
        span(12),
        resource={semconv.ROLLOUT_ID: "own-resource"},
    )
    path = "/rollouts/own-url/attempts/own-url-1/v1/traces"
    assert post(server, body.SerializeToString(), path=path).status_code == 200
    assert post(server, request_of(span(13)).SerializeToString(), path=path).status_code == 200
    for name, number in (("span", 11), ("resource", 12), ("url", 13)):
        (found,) = server.store.spans(f"own-{name}")
        assert found.span_id == f"{number:016x}"
        assert found.attempt_id == f"own-{name}-1"
        assert semconv.ROLLOUT_ID not in found.attributes


def test_an_attempts_key_names_the_attempt_and_writes_nothing_else(server: StoreServer) -> None:
    server.store.enqueue([queued("mine"), queued("theirs")])
    claims = {c.rollout.id: c for c in server.store.claim("w", 10)}
    reward = request_of(span(24))
    reward.resource_spans[0].scope_spans[0].scope.name = semconv.SCOPE_REWARD
    hidden = span(25)
    hidden.attributes.add(key=semconv.REWARD_VALUE).value.double_value = 1.0
    forged = request_of(span(26))
    forged.resource_spans[0].scope_spans[0].scope.name = semconv.SCOPE_GATEWAY
    body = request_of(
        span(21), span(22, agentlightning_rollout_id="theirs"), span(23, note=semconv.REWARD_VALUE), hidden
    )
    for other in (reward, forged):
        body.resource_spans.extend(other.resource_spans)
    headers = {"Authorization": f"Bearer {claims['mine'].key}"}
    answer = post(server, body.SerializeToString(), **headers)
    assert answer.status_code == 200
    partial = ExportTraceServiceResponse.FromString(answer.content).partial_success
    assert partial.rejected_spans == 4
    assert "rewards" in partial.error_message
    assert [s.span_id for s in server.store.spans("mine")] == [f"{n:016x}" for n in (21, 23)]
    assert list(server.store.spans("theirs")) == []


def test_an_unknown_attempt_in_the_url_is_not_found(server: StoreServer) -> None:
    server.store.enqueue([queued("known")])
    for path in ("/rollouts/unknown/attempts/unknown-1", "/rollouts/known/attempts/known-7"):
        answer = post(server, request_of(span(31)).SerializeToString(), path=path + "/v1/traces")
        assert answer.status_code == 404


# --- what is not taken ---------------------------------------------------------------------------


def test_spans_with_malformed_ids_or_times_are_counted_and_the_others_kept(server: StoreServer) -> None:
    late = span(42)
    late.start_time_unix_nano = 2**63
    bad = [pb.Span(name="none", start_time_unix_nano=1), pb.Span(trace_id=b"x", start_time_unix_nano=1), late]
    answer = post(server, request_of(span(41), *bad).SerializeToString())
    partial = ExportTraceServiceResponse.FromString(answer.content).partial_success
    assert (answer.status_code, partial.rejected_spans) == (200, 3)
    assert "malformed ids" in partial.error_message
    assert stored(server, 41) == ["work"]


def test_malformed_ids_in_json(server: StoreServer) -> None:
    body: Any = otlp.export_request([plain_span(4300), plain_span(4301)])
    body["resourceSpans"][0]["scopeSpans"][0]["spans"][1]["spanId"] = "0" * 16
    answer = httpx.post(server.url + "/v1/traces", json=body, headers=server.headers)
    assert answer.status_code == 200
    assert answer.json()["partialSuccess"]["rejectedSpans"] == "1"


def test_logs_and_metrics_are_refused_by_name(server: StoreServer) -> None:
    logs = ExportLogsServiceRequest()
    record = logs.resource_logs.add().scope_logs.add().log_records.add(time_unix_nano=5)
    record.body.string_value = "hello"
    metrics = ExportMetricsServiceRequest()
    point = metrics.resource_metrics.add().scope_metrics.add().metrics.add(name="m").gauge.data_points.add()
    point.as_int = 3
    for body in (logs, metrics):
        answer = post(server, body.SerializeToString())
        assert answer.status_code == 400
        assert b"logs or metrics" in answer.content
    answer = post(server, b'{"resourceLogs": []}', "application/json")
    assert answer.status_code == 400
    assert "resourceSpans" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"\xff\xff\xff", PROTOBUF),
        (b"nonsense", "application/json"),
        (b"[1, 2]", "application/json"),
        (b'{"resourceSpans": 3}', "application/json"),
        (b'{"resourceSpans": [{"scopeSpans": [{"spans": [7]}]}]}', "application/json"),
        (b'{"resourceSpans": NaN}', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"a":' * 100_000, "application/json"),
    ],
)
def test_malformed_bodies_are_400(server: StoreServer, body: bytes, content_type: str) -> None:
    answer = post(server, body, content_type)
    assert answer.status_code == 400
    assert answer.headers["content-type"].startswith(content_type)


def test_other_content_types_and_encodings_are_415(server: StoreServer) -> None:
    assert post(server, b"x", "text/plain").status_code == 415
    assert post(server, b"x", **{"Content-Encoding": "br"}).status_code == 415


def test_broken_gzip_is_400(server: StoreServer) -> None:
    whole = gzip.compress(request_of(span(51)).SerializeToString())
    for body in (b"not gzip", whole[:-9], whole + b"junk"):
        assert post(server, body, **{"Content-Encoding": "gzip"}).status_code == 400
    assert not server.store.rollouts() or live_rollout_id(f"{51:032x}") not in {
        r.id for r in server.store.rollouts()
    }


def test_a_gzip_bomb_is_413_and_takes_no_memory(server: StoreServer) -> None:
    bomb = gzip.compress(b"\0" * (256 * MIB), compresslevel=9)
    assert len(bomb) < MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(scaled(10, 100)):
        assert post(server, bomb, **{"Content-Encoding": "gzip"}).status_code == 413
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024  # KiB


def test_too_large_a_body_is_413_declared_or_chunked(server: StoreServer) -> None:
    def chunks() -> Generator[bytes]:
        for _ in range(21):
            yield b"\0" * MIB

    headers = {**server.headers, "Content-Type": PROTOBUF}
    for content in (b"\0" * (20 * MIB + 1), chunks()):
        try:
            answer = httpx.post(server.url + "/v1/traces", content=content, headers=headers, timeout=30)
        except httpx.WriteError:  # the server had answered and hung up before all was sent
            continue
        assert answer.status_code == 413


def test_mutated_bodies_never_break_the_decoder() -> None:
    parsed = refused = 0
    for body in mutations(scaled(20_000, 1_000_000)):
        try:
            rows_from_request(body)
            parsed += 1
        except InvalidSpans:
            refused += 1
    assert parsed > 100
    assert refused > 100


def test_mutated_bodies_never_break_the_server(server: StoreServer) -> None:
    with httpx.Client(base_url=server.url, headers=server.headers) as client:
        codes = {
            client.post("/v1/traces", content=body, headers={"Content-Type": kind}).status_code
            for body in mutations(scaled(1500, 25_000))
            for kind in (PROTOBUF, "application/json")
        }
        as_json = {"Content-Type": "application/json"}
        sample = otlp.export_request([plain_span(5000, attributes={"a": "b", "n": 1, "l": [1.5]})])
        codes |= {
            client.post("/v1/traces", content=orjson.dumps(body), headers=as_json).status_code
            for body in mangled_json(sample, 500)
        }
    assert codes <= {200, 400}
    assert server.client.healthy()


def mutations(count: int) -> Generator[bytes]:
    choose = random.Random(7)
    made = span(60, note="some text", agentlightning_rollout_id="r")
    made.events.add(name="event", time_unix_nano=3).attributes.add(key="k").value.int_value = 3
    made.attributes.add(key="list").value.array_value.values.add().kvlist_value.values.add(key="x")
    seed = request_of(made, span(61), resource={"service.name": "a"}).SerializeToString()
    for _ in range(count):
        body = bytearray(seed)
        for _ in range(choose.choice((1, 1, 2, 5))):
            at = choose.randrange(len(body))
            kind = choose.randrange(4)
            if kind == 0:
                body[at] = choose.randrange(256)
            elif kind == 1:
                body[at] ^= 1 << choose.randrange(8)
            elif kind == 2:
                del body[at : at + choose.randrange(1, 9)]
            else:
                body[at:at] = choose.randbytes(choose.randrange(1, 9))
            if not body:
                body = bytearray(b"\0")
        yield bytes(body)


def mangled_json(sample: Any, count: int) -> Generator[Any]:
    choose = random.Random(11)
    junk: list[Any] = [None, 3, -1, 1e300, "x", [], {}, [[]], True, "9" * 40, 2**62, {"stringValue": 3}]

    def mangle(value: Any) -> Any:
        if choose.random() < 0.04:
            return choose.choice(junk)
        if isinstance(value, dict):
            return {k: mangle(v) for k, v in value.items()}  # type: ignore[misc]
        if isinstance(value, list):
            return [mangle(v) for v in value]  # type: ignore[misc]
        return value

    for _ in range(count):
        yield mangle(sample)


# --- pressure ------------------------------------------------------------------------------------


def test_a_full_store_is_503_with_retry_after_and_loses_nothing_acknowledged(tmp_path: Path) -> None:
    bodies = [request_of(span(n)).SerializeToString() for n in (1, 2)]
    with store_server(tmp_path, max_pending=1) as server, ThreadPoolExecutor(1) as pool:
        with blocked(server.store):
            first = pool.submit(post, server, bodies[0])
            wait_until(lambda: server.store.pending == 1)
            refused = post(server, bodies[1])
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert first.result().status_code == 200
        assert stored(server, 1) == ["work"]
        assert [r.status for r in server.store.rollouts()] == [RolloutStatus.SUCCEEDED]
