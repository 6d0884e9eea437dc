from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1 import trace_pb2

from agentlightning import semconv
from agentlightning.errors import InvalidSpans
from agentlightning.otlp import (
    encode_request,
    export_request,
    span_from_json,
    span_to_json,
    spans_from_request,
)
from agentlightning.types import Span, SpanEvent, SpanKind, SpanLink, SpanStatus

TRACE, PARENT, CHILD = "a" * 32, "b" * 16, "c" * 16

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values: Any = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        texts,
        st.binary(max_size=8),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
attributes: Any = st.dictionaries(
    texts.filter(lambda key: key not in (semconv.ROLLOUT_ID, semconv.ATTEMPT_ID)), values, max_size=3
)
times = st.integers(0, 2**63 - 1)


def hex_ids(digits: int) -> Any:
    return st.integers(1, 16**digits - 1).map(lambda number: f"{number:0{digits}x}")


spans = st.builds(
    Span,
    trace_id=hex_ids(32),
    span_id=hex_ids(16),
    parent_id=st.none() | hex_ids(16),
    name=texts,
    kind=st.sampled_from(SpanKind),
    start_ns=times,
    end_ns=times,
    status=st.sampled_from(SpanStatus),
    status_message=texts,
    attributes=attributes,
    events=st.lists(st.builds(SpanEvent, texts, times, attributes), max_size=2).map(tuple),
    links=st.lists(st.builds(SpanLink, hex_ids(32), hex_ids(16), attributes), max_size=2).map(tuple),
    resource=st.sampled_from([{}, {"service.name": "agent"}, {"service.name": "other"}]),
    scope=st.sampled_from(["", "agentlightning", "other"]),
    rollout_id=st.none() | st.just("r1"),
    attempt_id=st.none() | st.just("r1-1"),
)


def span(**changes: Any) -> Span:
    fields: dict[str, Any] = {
        "trace_id": TRACE,
        "span_id": CHILD,
        "parent_id": PARENT,
        "name": "chat m",
        "kind": SpanKind.CLIENT,
        "start_ns": 1,
        "end_ns": 2,
    }
    return Span(**{**fields, **changes})


@given(spans)
def test_a_span_survives_json(original: Span) -> None:
    assert span_from_json(json.loads(json.dumps(span_to_json(original)))) == original


@given(st.lists(spans, max_size=5, unique_by=lambda item: item.span_id))
def test_a_request_gives_back_its_spans(originals: list[Span]) -> None:
    read = spans_from_request(json.loads(json.dumps(export_request(originals))))
    assert sorted(read, key=lambda item: item.span_id) == sorted(originals, key=lambda item: item.span_id)


@given(st.lists(spans, max_size=5, unique_by=lambda item: item.span_id))
def test_the_quick_writer_writes_the_same_request(originals: list[Span]) -> None:
    assert json.loads(encode_request(originals)) == json.loads(json.dumps(export_request(originals)))


def test_a_request_groups_by_resource_and_scope() -> None:
    request: Any = export_request(
        [
            span(resource={"service.name": "a"}, scope="x"),
            span(resource={"service.name": "b"}, scope="x"),
            span(resource={"service.name": "a"}, scope="y"),
        ]
    )
    assert [[s["scope"]["name"] for s in g["scopeSpans"]] for g in request["resourceSpans"]] == [
        ["x", "y"],
        ["x"],
    ]


def test_numbers_and_enums_match_the_protobuf_definitions() -> None:
    for kind in SpanKind:
        body: Any = span_to_json(span(kind=kind))
        assert trace_pb2.Span.SpanKind.Name(body["kind"]) == f"SPAN_KIND_{kind.name}"
    for status in SpanStatus:
        body = span_to_json(span(status=status))
        assert trace_pb2.Status.StatusCode.Name(body["status"]["code"]) == f"STATUS_CODE_{status.name}"
    assert span_to_json(span(start_ns=7))["startTimeUnixNano"] == "7"


def test_the_reader_takes_numbers_enum_names_and_upper_case_ids() -> None:
    read = span_from_json(
        {
            "traceId": TRACE.upper(),
            "spanId": CHILD,
            "parentSpanId": "",
            "name": "x",
            "kind": "SPAN_KIND_SERVER",
            "startTimeUnixNano": 5,
            "endTimeUnixNano": 6.0,
            "status": {"code": "STATUS_CODE_ERROR"},
            "attributes": [
                {"key": "n", "value": {"intValue": 3}},
                {"key": "nan", "value": {"doubleValue": "NaN"}},
            ],
            "fromTheFuture": {"ignored": True},
        }
    )
    assert (read.trace_id, read.parent_id, read.kind, read.start_ns, read.end_ns, read.status) == (
        TRACE,
        None,
        SpanKind.SERVER,
        5,
        6,
        SpanStatus.ERROR,
    )
    assert read.attributes["n"] == 3
    assert math.isnan(read.attributes["nan"])  # pyright: ignore[reportArgumentType]


def test_rollout_and_attempt_come_from_the_resource_where_the_span_has_none() -> None:
    body: Any = span_to_json(span())
    body["resource"] = {"attributes": [{"key": semconv.ROLLOUT_ID, "value": {"stringValue": "r9"}}]}
    assert span_from_json(body).rollout_id == "r9"
    body["attributes"].append({"key": semconv.ROLLOUT_ID, "value": {"stringValue": "r1"}})
    assert span_from_json(body).rollout_id == "r1"


def test_an_integer_beyond_64_bits_becomes_text() -> None:
    assert span_from_json(span_to_json(span(attributes={"n": 2**70}))).attributes == {"n": str(2**70)}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"traceId": "0" * 32}, "traceId"),
        ({"traceId": "xyz"}, "traceId"),
        ({"spanId": None}, "spanId"),
        ({"spanId": "g" * 16}, "spanId"),
        ({"parentSpanId": "short"}, "parentSpanId"),
        ({"startTimeUnixNano": "soon"}, "startTimeUnixNano"),
        ({"endTimeUnixNano": -1}, "endTimeUnixNano"),
        ({"kind": "SPAN_KIND_NONSENSE"}, "kind"),
        ({"name": 3}, "name"),
        ({"status": []}, "status"),
        ({"attributes": {"a": 1}}, "attributes"),
        ({"attributes": [{"value": {"intValue": 1}}]}, "attributes"),
        ({"attributes": [{"key": "a", "value": {"intValue": True}}]}, "a"),
        ({"attributes": [{"key": "a", "value": {"intValue": str(2**63)}}]}, "a"),
        ({"attributes": [{"key": "a", "value": {"bytesValue": "!"}}]}, "a"),
        ({"attributes": [{"key": "a", "value": {"doubleValue": "x"}}]}, "a"),
        ({"attributes": [{"key": "a", "value": {"boolValue": 1}}]}, "a"),
        ({"events": [{"timeUnixNano": "x"}]}, "events"),
        ({"links": [{"traceId": TRACE}]}, "links"),
    ],
)
def test_a_broken_span_is_refused_by_name_of_the_field(change: dict[str, Any], place: str) -> None:
    body: Any = export_request([span()])
    body["resourceSpans"][0]["scopeSpans"][0]["spans"][0].update(change)
    with pytest.raises(InvalidSpans, match=place):
        spans_from_request(body)


@pytest.mark.parametrize(
    "body", [None, [], "x", 3, {"spans": []}, {"resourceSpans": {}}, {"resourceSpans": [1]}]
)
def test_a_body_that_is_not_otlp_is_refused(body: object) -> None:
    if body is None:  # an absent body is an empty request, as in protobuf
        assert spans_from_request(body) == []
        return
    with pytest.raises(InvalidSpans):
        spans_from_request(body)


def test_a_deeply_nested_value_is_refused_and_not_followed() -> None:
    value: Any = {"stringValue": "x"}
    for _ in range(5000):
        value = {"arrayValue": {"values": [value]}}
    body: Any = span_to_json(span())
    body["attributes"] = [{"key": "deep", "value": value}]
    with pytest.raises(InvalidSpans, match="nested"):
        span_from_json(body)
