"""OTLP/JSON: `types.Span` to and from the JSON mapping of OpenTelemetry's trace protobufs.

Follows opentelemetry-proto's docs/specification.md, "JSON Protobuf Encoding": ids are hex, 64-bit integers
decimal strings, bytes base64, enums integers; the reader also takes plain numbers and enum names.
A span outside a request (`span_to_json`) carries its `resource` and `scope` beside the fields OTLP has, which
OTLP receivers ignore; inside a request (`export_request`) both are where OTLP wants them.

What this is not: the protobuf codec (server), nor a reader of meaning (`reading`).
Invariant: `spans_from_request(export_request(spans))` gives the same spans, in the order of their groups; the
rollout and attempt ids travel as span attributes and come back as the span's fields.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

import orjson

from agentlightning import semconv
from agentlightning.errors import InvalidSpans
from agentlightning.types import (
    Attributes,
    AttributeValue,
    Json,
    Span,
    SpanEvent,
    SpanKind,
    SpanLink,
    SpanStatus,
)

T = TypeVar("T")

KINDS: Final = (
    SpanKind.INTERNAL,  # 0, unspecified: the specification says to assume internal
    SpanKind.INTERNAL,
    SpanKind.SERVER,
    SpanKind.CLIENT,
    SpanKind.PRODUCER,
    SpanKind.CONSUMER,
)
STATUSES: Final = (SpanStatus.UNSET, SpanStatus.OK, SpanStatus.ERROR)
KIND_NUMBERS: Final = {kind: number for number, kind in enumerate(KINDS)}
STATUS_NUMBERS: Final = {status: number for number, status in enumerate(STATUSES)}
_KIND_NAMES: Final = {f"SPAN_KIND_{kind.name}": kind for kind in SpanKind} | {
    "SPAN_KIND_UNSPECIFIED": SpanKind.INTERNAL
}
_STATUS_NAMES: Final = {f"STATUS_CODE_{status.name}": status for status in SpanStatus}
_INT64: Final = range(-(2**63), 2**63)
_MAX_DEPTH: Final = 64  # of nested attribute values, so that a hostile body cannot exhaust the stack
_HEX: Final = frozenset("0123456789abcdef")


# --- writing -------------------------------------------------------------------------------------


def value_to_json(value: AttributeValue) -> dict[str, Json]:
    """OTLP's AnyValue of a Python value. None is the empty value; integers beyond 64 bits become text."""
    if isinstance(value, str):
        return {"stringValue": value}
    if value is None:
        return {}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)} if value in _INT64 else {"stringValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value if math.isfinite(value) else _non_finite(value)}
    if isinstance(value, bytes):
        return {"bytesValue": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Mapping):
        return {"kvlistValue": {"values": attributes_to_json(value)}}
    return {"arrayValue": {"values": [value_to_json(item) for item in value]}}


def _non_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def attributes_to_json(attributes: Attributes) -> list[dict[str, Json]]:
    """OTLP's list of key and value."""
    return [
        {"key": key, "value": {"stringValue": value} if type(value) is str else value_to_json(value)}
        for key, value in attributes.items()
    ]


def span_to_json(span: Span) -> dict[str, Json]:
    """One span with its `resource` and `scope` beside it; rollout and attempt ids as span attributes."""
    body = _bare_span(span)
    body["resource"] = {"attributes": attributes_to_json(span.resource)}
    body["scope"] = {"name": span.scope}
    return body


def _bare_span(span: Span) -> dict[str, Json]:
    body: dict[str, Json] = {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "parentSpanId": span.parent_id or "",
        "name": span.name,
        "kind": KIND_NUMBERS[span.kind],
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": attributes_to_json(_with_identity(span)),
        "status": {"code": STATUS_NUMBERS[span.status], "message": span.status_message},
    }
    if span.events:
        body["events"] = [
            {
                "name": event.name,
                "timeUnixNano": str(event.time_ns),
                "attributes": attributes_to_json(event.attributes),
            }
            for event in span.events
        ]
    if span.links:
        body["links"] = [
            {
                "traceId": link.trace_id,
                "spanId": link.span_id,
                "attributes": attributes_to_json(link.attributes),
            }
            for link in span.links
        ]
    return body


def _with_identity(span: Span) -> Attributes:
    identity: dict[str, AttributeValue] = {}
    if span.rollout_id is not None:
        identity[semconv.ROLLOUT_ID] = span.rollout_id
    if span.attempt_id is not None:
        identity[semconv.ATTEMPT_ID] = span.attempt_id
    return {**span.attributes, **identity} if identity else span.attributes


def export_request(spans: Iterable[Span]) -> dict[str, Any]:
    """An ExportTraceServiceRequest: the spans grouped by resource, then by scope."""
    return _request(spans, _bare_span)


def encode_request(spans: Iterable[Span]) -> bytes:
    """`export_request` as JSON text, written span by span, which takes half the time."""
    return orjson.dumps(_request(spans, lambda span: orjson.Fragment(orjson.dumps(_bare_span(span)))))


def _request(spans: Iterable[Span], write: Callable[[Span], object]) -> dict[str, Any]:
    groups: list[tuple[Attributes, dict[str, list[object]]]] = []
    for span in spans:
        resource = span.resource
        scopes = next((scopes for known, scopes in groups if known is resource or known == resource), None)
        if scopes is None:
            scopes = dict[str, list[object]]()
            groups.append((resource, scopes))
        scopes.setdefault(span.scope, []).append(write(span))
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": attributes_to_json(resource)},
                "scopeSpans": [{"scope": {"name": name}, "spans": bodies} for name, bodies in scopes.items()],
            }
            for resource, scopes in groups
        ]
    }


# --- reading -------------------------------------------------------------------------------------


def spans_from_request(request: object) -> list[Span]:
    """The spans of an ExportTraceServiceRequest. Raises InvalidSpans that names the place."""
    spans: list[Span] = []
    body = _object(request, "the request body")
    if "resourceSpans" not in body and "resource_spans" not in body and body:
        raise InvalidSpans('The request body is not OTLP: it has no "resourceSpans". Send OTLP/JSON traces.')
    for i, group in enumerate(_objects(body, "resourceSpans", "resource_spans")):
        resource = _resource(group.get("resource"))
        for j, scoped in enumerate(_objects(group, "scopeSpans", "scope_spans")):
            scope = _scope(scoped.get("scope"))
            for k, span in enumerate(_objects(scoped, "spans")):
                place = f"resourceSpans[{i}].scopeSpans[{j}].spans[{k}]"
                spans.append(_span(span, resource, scope, place))
    return spans


def span_from_json(body: object) -> Span:
    """The span that `span_to_json` wrote. Raises InvalidSpans when it is none."""
    span = _object(body, "the span")
    return _span(span, _resource(span.get("resource")), _scope(span.get("scope")), "span")


def attributes_from_json(items: object, place: str = "attributes") -> dict[str, AttributeValue]:
    """A dict from OTLP's list of key and value; a repeated key keeps its last value."""
    attributes: dict[str, AttributeValue] = {}
    for item in _list(items, place):
        pair = _object(item, place)
        key = pair.get("key")
        if not isinstance(key, str):
            raise InvalidSpans(f'{place} has an entry without a text "key".')
        attributes[key] = value_from_json(pair.get("value"), f"{place}[{key}]")
    return attributes


def value_from_json(value: object, place: str = "value", depth: int = 0) -> AttributeValue:
    """The Python value of OTLP's AnyValue; the empty value is None."""
    if value is None:
        return None
    if depth > _MAX_DEPTH:
        raise InvalidSpans(f"{place} is nested deeper than {_MAX_DEPTH} levels; flatten it.")
    for name, content in _object(value, place).items():
        reader = _VALUE_READERS.get(name)
        if reader is not None:
            return reader(content, place, depth)
    return None


def _string_value(content: object, place: str, _depth: int) -> AttributeValue:
    return _text(content, place)


def _bool_value(content: object, place: str, _depth: int) -> AttributeValue:
    if not isinstance(content, bool):
        raise InvalidSpans(f"{place} has a boolValue that is not true or false.")
    return content


def _int_value(content: object, place: str, _depth: int) -> AttributeValue:
    return _integer(content, place, _INT64)


def _double_value(content: object, place: str, _depth: int) -> AttributeValue:
    if isinstance(content, (int, float, str)) and not isinstance(content, bool):
        try:
            return float(content)
        except (ValueError, OverflowError):
            pass
    raise InvalidSpans(f"{place} has a doubleValue that is not a number.")


def _bytes_value(content: object, place: str, _depth: int) -> AttributeValue:
    text = _text(content, place).replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidSpans(f"{place} has a bytesValue that is not base64: {error}.") from None


def _array_value(content: object, place: str, depth: int) -> AttributeValue:
    values = _list(_object(content, place).get("values"), place)
    return [value_from_json(value, place, depth + 1) for value in values]


def _kvlist_value(content: object, place: str, depth: int) -> AttributeValue:
    pairs = [_object(pair, place) for pair in _list(_object(content, place).get("values"), place)]
    return {
        _text(pair.get("key"), place): value_from_json(pair.get("value"), place, depth + 1) for pair in pairs
    }


_VALUE_READERS: Final[Mapping[str, Callable[[object, str, int], AttributeValue]]] = {
    "stringValue": _string_value,
    "boolValue": _bool_value,
    "intValue": _int_value,
    "doubleValue": _double_value,
    "bytesValue": _bytes_value,
    "arrayValue": _array_value,
    "kvlistValue": _kvlist_value,
}


def _span(body: Mapping[str, object], resource: Attributes, scope: str, place: str) -> Span:
    attributes = attributes_from_json(body.get("attributes"), f"{place}.attributes")
    status = _object(body.get("status"), f"{place}.status")
    rollout_id = attributes.pop(semconv.ROLLOUT_ID, None) or resource.get(semconv.ROLLOUT_ID)
    attempt_id = attributes.pop(semconv.ATTEMPT_ID, None) or resource.get(semconv.ATTEMPT_ID)
    return Span(
        trace_id=_id(body.get("traceId"), 32, f"{place}.traceId"),
        span_id=_id(body.get("spanId"), 16, f"{place}.spanId"),
        parent_id=_parent(body.get("parentSpanId"), f"{place}.parentSpanId"),
        name=_text(body.get("name"), f"{place}.name"),
        kind=_enum(body.get("kind"), KINDS, _KIND_NAMES, f"{place}.kind"),
        start_ns=_time(body.get("startTimeUnixNano"), f"{place}.startTimeUnixNano"),
        end_ns=_time(body.get("endTimeUnixNano"), f"{place}.endTimeUnixNano"),
        status=_enum(status.get("code"), STATUSES, _STATUS_NAMES, f"{place}.status.code"),
        status_message=_text(status.get("message"), f"{place}.status.message"),
        attributes=attributes,
        events=tuple(_event(event, f"{place}.events") for event in _objects(body, "events")),
        links=tuple(_link(link, f"{place}.links") for link in _objects(body, "links")),
        resource=resource,
        scope=scope,
        rollout_id=None if rollout_id is None else str(rollout_id),
        attempt_id=None if attempt_id is None else str(attempt_id),
    )


def _event(body: Mapping[str, object], place: str) -> SpanEvent:
    return SpanEvent(
        name=_text(body.get("name"), f"{place}.name"),
        time_ns=_time(body.get("timeUnixNano"), f"{place}.timeUnixNano"),
        attributes=attributes_from_json(body.get("attributes"), f"{place}.attributes"),
    )


def _link(body: Mapping[str, object], place: str) -> SpanLink:
    return SpanLink(
        trace_id=_id(body.get("traceId"), 32, f"{place}.traceId"),
        span_id=_id(body.get("spanId"), 16, f"{place}.spanId"),
        attributes=attributes_from_json(body.get("attributes"), f"{place}.attributes"),
    )


def _resource(body: object) -> dict[str, AttributeValue]:
    return attributes_from_json(_object(body, "resource").get("attributes"), "resource.attributes")


def _scope(body: object) -> str:
    return _text(_object(body, "scope").get("name"), "scope.name")


def _object(value: object, place: str) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidSpans(f"{place} must be a JSON object, not {type(value).__name__}.")
    return cast("Mapping[str, object]", value)


def _list(value: object, place: str) -> Sequence[object]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise InvalidSpans(f"{place} must be a JSON array, not {type(value).__name__}.")
    return cast("Sequence[object]", value)


def _objects(body: Mapping[str, object], *names: str) -> list[Mapping[str, object]]:
    value = next((body[name] for name in names if name in body), None)
    return [_object(item, f"{names[0]}[{i}]") for i, item in enumerate(_list(value, names[0]))]


def _text(value: object, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidSpans(f"{place} must be text, not {type(value).__name__}.")
    return value


def _integer(value: object, place: str, allowed: range) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is not None and number in allowed:
            return number
    raise InvalidSpans(f"{place} must be an integer from {allowed.start} to {allowed.stop - 1}.")


def _time(value: object, place: str) -> int:
    return 0 if value is None else _integer(value, place, range(2**63))


def _id(value: object, digits: int, place: str) -> str:
    text = value.lower() if isinstance(value, str) else ""
    if len(text) != digits or not _HEX.issuperset(text) or not text.strip("0"):
        raise InvalidSpans(f"{place} must be {digits} hex digits, not all zero (got {value!r:.60}).")
    return text


def _parent(value: object, place: str) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip("0")):
        return None
    return _id(value, 16, place)


def _enum(value: object, by_number: Sequence[T], by_name: Mapping[str, T], place: str) -> T:
    if value is None:
        return by_number[0]
    if isinstance(value, str) and value in by_name:
        return by_name[value]
    number = _integer(value, place, range(-(2**31), 2**31))
    # A number from a newer OTLP is not an error, it is a value that this reader does not know.
    return by_number[number] if 0 <= number < len(by_number) else by_number[0]
