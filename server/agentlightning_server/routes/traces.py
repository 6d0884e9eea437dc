"""OTLP/HTTP ingest of spans, in protobuf and JSON.

    POST /v1/traces
    POST /rollouts/{rollout}/attempts/{attempt}/v1/traces

A span belongs to the rollout its attributes name, else its resource's, else the URL's, else the key's, else
to the live one of its trace.
Invariant: a 200 follows the commit of every span that was not rejected by count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

import orjson
from google.rpc.status_pb2 import Status
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentlightning import otlp, semconv
from agentlightning.errors import AgentLightningError, InvalidInput, InvalidSpans

from .. import otlp_pb
from ..auth import KeyScope, Principal, guard_attempt, guard_model, principal
from ..http_errors import error_response, json_response
from ..otlp_pb import SpanRow
from ..store import Store
from .body import read_body

PROTOBUF, JSON = "application/x-protobuf", "application/json"
_OFF_LOOP_BYTES = 256 * 1024  # decoding more than this would hold up other requests for milliseconds
_FOREIGN = "spans of another attempt, or rewards, which an attempt's key may not give"
_MALFORMED = "spans with malformed ids or times"


class Ingest:
    """The trace endpoint over one store."""

    def __init__(self, store: Store, max_body_bytes: int) -> None:
        self._store = store
        self._limit = max_body_bytes

    def routes(self) -> list[Route]:
        """Both paths."""
        return [
            Route("/v1/traces", self.export, methods=["POST"]),
            Route("/rollouts/{rollout}/attempts/{attempt}/v1/traces", self.export, methods=["POST"]),
        ]

    async def export(self, request: Request) -> Response:
        """Answer in the request's encoding, errors too, as OTLP/HTTP asks."""
        encoding = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if encoding not in (PROTOBUF, JSON):
            raise HTTPException(415, f"Content-Type {encoding!r} is not taken: use {PROTOBUF} or {JSON}")
        try:
            rejected, reason = await self._store_spans(request, encoding)
        except (AgentLightningError, HTTPException) as error:
            return _failure(error, encoding)
        return _success(rejected, reason, encoding)

    async def _store_spans(self, request: Request, encoding: str) -> tuple[int, str]:
        owner = principal(request)
        guard_model(owner)
        store = self._store.of(owner.project)
        await _check_path(request, owner, store)
        body = await read_body(request, self._limit)
        decode = otlp_pb.rows_from_request if encoding == PROTOBUF else rows_from_json
        rows, malformed = await _off_loop_if_large(decode, body)
        kept = list(_permitted(rows, owner, request.path_params))
        if kept:
            await asyncio.wrap_future(store.submit_rows(kept))
        foreign = len(rows) - len(kept)
        reasons = [text for count, text in ((malformed, _MALFORMED), (foreign, _FOREIGN)) if count]
        return malformed + foreign, "rejected " + " and ".join(reasons)


async def _check_path(request: Request, owner: Principal, store: Store) -> None:
    rollout_id, attempt_id = request.path_params.get("rollout"), request.path_params.get("attempt")
    guard_attempt(owner, rollout_id, attempt_id)
    if rollout_id is not None and owner.scope is not KeyScope.ATTEMPT:
        known = await asyncio.to_thread(store.attempts, rollout_id)
        if attempt_id not in {attempt.id for attempt in known}:
            raise HTTPException(404, f"rollout {rollout_id} has no attempt {attempt_id}")


def _permitted(rows: list[SpanRow], owner: Principal, path: dict[str, Any]) -> Iterator[SpanRow]:
    """The rows with the identity that URL and key give them, less those the key may not write."""
    rollout_id = path.get("rollout") or owner.rollout_id
    attempt_id = path.get("attempt") or owner.attempt_id
    for row in rows:
        if row["rollout_id"] is None:
            row["rollout_id"], row["attempt_id"] = rollout_id, attempt_id
        elif row["attempt_id"] is None and row["rollout_id"] == rollout_id:
            row["attempt_id"] = attempt_id
        if owner.scope is not KeyScope.ATTEMPT or _is_own(row, owner):
            yield row


def _is_own(row: SpanRow, owner: Principal) -> bool:
    return (
        row["rollout_id"] == owner.rollout_id
        and row["attempt_id"] == owner.attempt_id
        and row["scope"] not in (semconv.SCOPE_REWARD, semconv.SCOPE_GATEWAY)
        and not _gives_reward(row)
    )


def _gives_reward(row: SpanRow) -> bool:
    if semconv.REWARD_VALUE.encode() not in row["body"]:  # cheap, and enough for nearly every span
        return False
    span = otlp_pb.span_from_row(row)
    return any(semconv.REWARD_VALUE in part.attributes for part in (span, *span.events))


async def _off_loop_if_large(
    decode: Callable[[bytes], tuple[list[SpanRow], int]], body: bytes
) -> tuple[list[SpanRow], int]:
    if len(body) <= _OFF_LOOP_BYTES:
        return decode(body)
    return await asyncio.to_thread(decode, body)


# --- JSON ----------------------------------------------------------------------------------------


def rows_from_json(body: bytes) -> tuple[list[SpanRow], int]:
    """As `otlp_pb.rows_from_request`, for OTLP/JSON."""
    try:
        request = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise InvalidSpans(f"the body is not JSON: {error}") from error
    rejected = _drop_malformed_ids(request)
    return [otlp_pb.row_from_span(span) for span in otlp.spans_from_request(request)], rejected


def _drop_malformed_ids(request: Any) -> int:
    """Take spans with malformed ids out of the request, so that the others can be read. Returns how many."""
    rejected = 0
    for scoped in _dicts(request, "resourceSpans", "scopeSpans"):
        spans = scoped.get("spans")
        if isinstance(spans, list):
            good = [span for span in cast(list[Any], spans) if _has_valid_ids(span)]
            rejected += len(cast(list[Any], spans)) - len(good)
            scoped["spans"] = good
    return rejected


def _dicts(body: Any, *path: str) -> Iterator[dict[str, Any]]:
    if not path:
        if isinstance(body, dict):
            yield body
        return
    items: Any = cast(dict[str, Any], body).get(path[0]) if isinstance(body, dict) else None
    for item in cast(list[Any], items) if isinstance(items, list) else []:
        yield from _dicts(item, *path[1:])


def _has_valid_ids(span: Any) -> bool:
    """Spans that are no objects pass: the codec names what is wrong with them."""
    if not isinstance(span, dict):
        return True
    fields = cast(dict[str, Any], span)
    try:
        trace_id, span_id = bytes.fromhex(fields.get("traceId", "")), bytes.fromhex(fields.get("spanId", ""))
    except (TypeError, ValueError):
        return False
    return otlp_pb.valid_ids(trace_id, span_id)


# --- responses -----------------------------------------------------------------------------------


def _success(rejected: int, reason: str, encoding: str) -> Response:
    if encoding == PROTOBUF:
        return Response(otlp_pb.response(rejected, reason), media_type=PROTOBUF)
    if not rejected:
        return json_response({})
    return json_response({"partialSuccess": {"rejectedSpans": str(rejected), "errorMessage": reason}})


def _failure(error: AgentLightningError | HTTPException, encoding: str) -> Response:
    response = error_response(error)
    if encoding == JSON:
        return response
    message = str(error.detail) if isinstance(error, HTTPException) else str(error)
    code = 3 if isinstance(error, InvalidInput) else 14 if response.status_code == 503 else 2
    headers = {k: v for k, v in response.headers.items() if k in ("retry-after", "www-authenticate")}
    body = Status(code=code, message=message).SerializeToString()
    return Response(body, response.status_code, headers, media_type=PROTOBUF)
