"""OTLP protobuf to rows of the store and back to `types.Span`.

A stored span is the very protobuf that arrived (`body`), with its resource and scope (`head`) beside it, so
nothing a foreign tracer wrote is lost and ingest never builds Python objects it does not need. Not here: the
JSON encoding, which is core's `otlp`, and whom a span belongs to, which the store decides.
Invariant: whatever bytes come in, the only errors that leave are InvalidSpans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TypedDict

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2 as pb

from agentlightning import semconv
from agentlightning.errors import InvalidSpans
from agentlightning.types import (
    Attributes,
    AttributeValue,
    Span,
    SpanEvent,
    SpanKind,
    SpanLink,
    SpanStatus,
)

MAX_INT64 = 2**63 - 1
TRACE_ID_BYTES, SPAN_ID_BYTES = 16, 8
_MAX_DEPTH = 50  # of nested attribute values; upb refuses deeper ones when parsing

_KINDS = (
    SpanKind.INTERNAL,  # unspecified
    SpanKind.INTERNAL,
    SpanKind.SERVER,
    SpanKind.CLIENT,
    SpanKind.PRODUCER,
    SpanKind.CONSUMER,
)
_STATUSES = (SpanStatus.UNSET, SpanStatus.OK, SpanStatus.ERROR)
_KIND_CODES = {kind: code for code, kind in enumerate(_KINDS) if code}
_STATUS_CODES = {status: code for code, status in enumerate(_STATUSES)}


class SpanRow(TypedDict):
    """One row of the spans table. Ids are lower-case hex; `failed` is whether the status is ERROR."""

    trace_id: str
    span_id: str
    parent_id: str | None
    rollout_id: str | None
    attempt_id: str | None
    name: str
    scope: str
    start_ns: int
    end_ns: int
    failed: bool
    head: bytes
    body: bytes


def row_size(row: SpanRow) -> int:
    """Bytes that a row holds while it waits to be written."""
    return len(row["head"]) + len(row["body"]) + 200


# --- requests ------------------------------------------------------------------------------------


def rows_from_request(body: bytes) -> tuple[list[SpanRow], int]:
    """Rows of an ExportTraceServiceRequest and the number of spans that were rejected for their ids or times.

    Raises InvalidSpans when the body is not one, or is OTLP logs or metrics (which parse as spans without
    ids or times).
    """
    try:
        request = ExportTraceServiceRequest.FromString(body)
        rows, rejected, shapeless = _rows(request)
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise InvalidSpans(
            "the body is not an OTLP ExportTraceServiceRequest in protobuf; for JSON send "
            f"Content-Type: application/json ({error})"
        ) from error
    if shapeless and shapeless == len(rows) + rejected:
        raise InvalidSpans(
            "no span of the body has an id or a start time: it looks like OTLP logs or metrics, "
            "which are not taken here; send traces only"
        )
    return rows, rejected


def _rows(request: ExportTraceServiceRequest) -> tuple[list[SpanRow], int, int]:
    rows: list[SpanRow] = []
    rejected = shapeless = 0
    for group, scope_spans in _groups(request):
        head = pb.ResourceSpans(
            resource=group.resource, scope_spans=[pb.ScopeSpans(scope=scope_spans.scope)]
        ).SerializeToString()
        inherited = _identity(group.resource.attributes)
        for span in scope_spans.spans:
            if valid_ids(span.trace_id, span.span_id) and _valid_times(span):
                rows.append(_row(span, head, scope_spans.scope.name, inherited))
            else:
                rejected += 1
                shapeless += not span.start_time_unix_nano
    return rows, rejected, shapeless


def _groups(request: ExportTraceServiceRequest) -> Iterator[tuple[pb.ResourceSpans, pb.ScopeSpans]]:
    for resource_spans in request.resource_spans:
        for scope_spans in resource_spans.scope_spans:
            yield resource_spans, scope_spans


def _row(span: pb.Span, head: bytes, scope: str, inherited: tuple[str | None, str | None]) -> SpanRow:
    body = span.SerializeToString()
    rollout_id, attempt_id = inherited
    if b"agentlightning." in body:  # a search in C; most foreign spans need no look at each attribute
        own_rollout, own_attempt = _identity(span.attributes)
        rollout_id, attempt_id = (
            (own_rollout, own_attempt) if own_rollout else (rollout_id, own_attempt or attempt_id)
        )
    parent = span.parent_span_id
    return {
        "trace_id": span.trace_id.hex(),
        "span_id": span.span_id.hex(),
        "parent_id": parent.hex() if any(parent) else None,
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "name": span.name,
        "scope": scope,
        "start_ns": span.start_time_unix_nano,
        "end_ns": span.end_time_unix_nano,
        "failed": span.status.code == pb.Status.STATUS_CODE_ERROR,
        "head": head,
        "body": body,
    }


def _identity(attributes: Sequence[KeyValue]) -> tuple[str | None, str | None]:
    rollout_id = attempt_id = None
    for pair in attributes:
        if pair.key == semconv.ROLLOUT_ID:
            rollout_id = pair.value.string_value or None
        elif pair.key == semconv.ATTEMPT_ID:
            attempt_id = pair.value.string_value or None
    return rollout_id, attempt_id


def valid_ids(trace_id: bytes, span_id: bytes) -> bool:
    """OTLP's rule: 16 and 8 bytes, neither all zero."""
    return (
        len(trace_id) == TRACE_ID_BYTES and len(span_id) == SPAN_ID_BYTES and any(trace_id) and any(span_id)
    )


def _valid_times(span: pb.Span) -> bool:
    return span.start_time_unix_nano <= MAX_INT64 and span.end_time_unix_nano <= MAX_INT64


def response(rejected: int, message: str) -> bytes:
    """An ExportTraceServiceResponse in protobuf; empty when nothing was rejected."""
    reply = ExportTraceServiceResponse()
    if rejected:
        reply.partial_success.rejected_spans = rejected
        reply.partial_success.error_message = message
    return reply.SerializeToString()


# --- types.Span to a row -------------------------------------------------------------------------


def row_from_span(span: Span) -> SpanRow:
    """The row of a span. Raises InvalidSpans for ids or times that OTLP cannot hold."""
    message = _encode(span)
    return {
        "trace_id": span.trace_id,
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "rollout_id": span.rollout_id or _text(span.attributes, span.resource, semconv.ROLLOUT_ID),
        "attempt_id": span.attempt_id or _text(span.attributes, span.resource, semconv.ATTEMPT_ID),
        "name": message.name,
        "scope": span.scope,
        "start_ns": span.start_ns,
        "end_ns": span.end_ns,
        "failed": span.status is SpanStatus.ERROR,
        "head": _encode_head(span.resource, span.scope),
        "body": message.SerializeToString(),
    }


def _text(attributes: Attributes, resource: Attributes, name: str) -> str | None:
    value = attributes.get(name) or resource.get(name)
    return value if isinstance(value, str) else None


def _encode(span: Span) -> pb.Span:
    try:
        trace_id, span_id = bytes.fromhex(span.trace_id), bytes.fromhex(span.span_id)
        parent_id = bytes.fromhex(span.parent_id or "")
    except ValueError as error:
        raise InvalidSpans(f"span {span.name!r} has an id that is not hexadecimal: {error}") from error
    times = span.start_ns, span.end_ns
    if not valid_ids(trace_id, span_id) or len(parent_id) not in (0, SPAN_ID_BYTES):
        raise InvalidSpans(f"span {span.name!r} needs ids of 32 and 16 hex digits that are not all zero")
    if min(times) < 0 or max(times) > MAX_INT64:
        raise InvalidSpans(f"span {span.name!r} has a time outside of 0..2^63 nanoseconds")
    return pb.Span(
        trace_id=trace_id,
        span_id=span_id,
        parent_span_id=parent_id,
        name=_utf8(span.name),
        kind=_KIND_CODES[span.kind],  # pyright: ignore[reportArgumentType]
        start_time_unix_nano=span.start_ns,
        end_time_unix_nano=span.end_ns,
        attributes=_pairs(span.attributes),
        events=[_encode_event(event) for event in span.events],
        links=[_encode_link(link) for link in span.links],
        status=pb.Status(
            code=_STATUS_CODES[span.status],  # pyright: ignore[reportArgumentType]
            message=_utf8(span.status_message),
        ),
    )


def _encode_event(event: SpanEvent) -> pb.Span.Event:
    return pb.Span.Event(
        name=_utf8(event.name), time_unix_nano=event.time_ns, attributes=_pairs(event.attributes)
    )


def _encode_link(link: SpanLink) -> pb.Span.Link:
    return pb.Span.Link(
        trace_id=bytes.fromhex(link.trace_id),
        span_id=bytes.fromhex(link.span_id),
        attributes=_pairs(link.attributes),
    )


def _encode_head(resource: Attributes, scope: str) -> bytes:
    return _encode_whole_head(resource, scope) if resource else _encode_plain_head(scope)


@lru_cache(maxsize=64)
def _encode_plain_head(scope: str) -> bytes:
    return _encode_whole_head({}, scope)


def _encode_whole_head(resource: Attributes, scope: str) -> bytes:
    return pb.ResourceSpans(
        resource=Resource(attributes=_pairs(resource)),
        scope_spans=[pb.ScopeSpans(scope=InstrumentationScope(name=_utf8(scope)))],
    ).SerializeToString()


def _pairs(attributes: Attributes) -> list[KeyValue]:
    return [_pair(name, value) for name, value in attributes.items()]


def _pair(name: str, value: AttributeValue) -> KeyValue:
    if type(value) is str:  # nearly all are; what cannot be written takes the long way
        try:
            return KeyValue(key=name, value=AnyValue(string_value=value))
        except (UnicodeEncodeError, ValueError):
            pass
    return KeyValue(key=_utf8(name), value=_any_value(value))


def _any_value(value: AttributeValue, depth: int = 0) -> AnyValue:
    message = AnyValue()
    match value:
        case None:
            pass
        case str():
            message.string_value = _utf8(value)
        case bool():
            message.bool_value = value
        case int() if -MAX_INT64 - 1 <= value <= MAX_INT64:
            message.int_value = value
        case float():
            message.double_value = value
        case bytes():
            message.bytes_value = value
        case Mapping() if depth < _MAX_DEPTH:
            pairs = [KeyValue(key=_utf8(str(k)), value=_any_value(v, depth + 1)) for k, v in value.items()]
            message.kvlist_value.values.extend(pairs)
        case Sequence() if depth < _MAX_DEPTH:
            message.array_value.values.extend(_any_value(item, depth + 1) for item in value)
            message.array_value.SetInParent()
        case _:  # whatever a framework put there: better as text than lost
            message.string_value = _utf8(str(value))
    return message


def _utf8(text: str) -> str:
    """Text that protobuf accepts: lone surrogates, which models do produce, become escapes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


# --- a row to types.Span -------------------------------------------------------------------------


def span_from_row(row: Mapping[str, object]) -> Span:
    """The span of a stored row (columns rollout_id, attempt_id, head and body)."""
    head, body = row["head"], row["body"]
    assert isinstance(head, bytes)
    assert isinstance(body, bytes)
    resource, scope = _decode_head(head)
    message = pb.Span.FromString(body)
    rollout_id, attempt_id = row["rollout_id"], row["attempt_id"]
    attributes = _attributes(message.attributes)
    for identity in (semconv.ROLLOUT_ID, semconv.ATTEMPT_ID):  # fields of the span, as in OTLP/JSON
        attributes.pop(identity, None)
    return Span(
        trace_id=message.trace_id.hex(),
        span_id=message.span_id.hex(),
        parent_id=message.parent_span_id.hex() if any(message.parent_span_id) else None,
        name=message.name,
        kind=_KINDS[message.kind] if message.kind < len(_KINDS) else SpanKind.INTERNAL,
        start_ns=message.start_time_unix_nano,
        end_ns=message.end_time_unix_nano,
        status=_STATUSES[message.status.code] if message.status.code < len(_STATUSES) else SpanStatus.UNSET,
        status_message=message.status.message,
        attributes=attributes,
        events=tuple(
            SpanEvent(event.name, event.time_unix_nano, _attributes(event.attributes))
            for event in message.events
        ),
        links=tuple(
            SpanLink(link.trace_id.hex(), link.span_id.hex(), _attributes(link.attributes))
            for link in message.links
        ),
        resource=resource,
        scope=scope,
        rollout_id=rollout_id if isinstance(rollout_id, str) else None,
        attempt_id=attempt_id if isinstance(attempt_id, str) else None,
    )


@lru_cache(maxsize=512)
def _decode_head(head: bytes) -> tuple[Attributes, str]:
    message = pb.ResourceSpans.FromString(head)
    return _attributes(message.resource.attributes), message.scope_spans[0].scope.name


def _attributes(pairs: Sequence[KeyValue]) -> dict[str, AttributeValue]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> AttributeValue:
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "int_value":
            return value.int_value
        case "double_value":
            return value.double_value
        case "bool_value":
            return value.bool_value
        case "bytes_value":
            return value.bytes_value
        case "array_value":
            return [_value(item) for item in value.array_value.values]
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case _:
            return None
