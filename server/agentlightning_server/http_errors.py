"""The one mapping of errors to HTTP: statuses, codes and bodies in OpenAI's shape.

    {"error": {"message": ..., "type": ..., "code": ...}}

Invariant: what we raise keeps its message; what we did not foresee is logged and answered without details.
"""

from __future__ import annotations

import logging
import math

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from agentlightning import errors

logger = logging.getLogger(__name__)

BUSY = 503  # for spans and the queue: OpenTelemetry's exporters drop what is answered with 429
BUSY_MODEL = 429  # for model calls: the OpenAI SDK waits and tries again
STORE_RETRY_S = 10.0  # a full disk does not mend itself within a second

# First match wins: subclasses before their bases.
_KNOWN: tuple[tuple[type[Exception], int, str], ...] = (
    (errors.InvalidReward, 422, "invalid_reward"),
    (errors.PromptTooLong, 400, "context_length_exceeded"),
    (errors.InvalidTaskFile, 400, "invalid_task_file"),
    (errors.InvalidSpans, 400, "invalid_spans"),
    (errors.InvalidInput, 400, "invalid_input"),
    (errors.ModelNotFound, 404, "model_not_found"),
    (errors.NotFound, 404, "not_found"),
    (errors.Conflict, 409, "conflict"),
    (errors.NothingToLearn, 422, "nothing_to_learn"),
    (errors.Unavailable, BUSY, "unavailable"),
    (errors.StoreError, 503, "store_error"),
)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


def json_response(body: object, status: int = 200) -> Response:
    """JSON by orjson, which is several times faster than the standard library."""
    return Response(orjson.dumps(body), status, media_type="application/json")


def error_response(error: Exception, *, busy_status: int = BUSY) -> Response:
    """The response for an error. `busy_status` is what Unavailable becomes: 503, or 429 for model calls."""
    status, code, headers = _classify(error, busy_status)
    if status == 500:
        logger.error("unforeseen error while answering a request", exc_info=error)
        message = "internal error; the server's log has the details"
    else:
        message = str(error.detail) if isinstance(error, HTTPException) else str(error)
    response = json_response(error_body(message, status, code), status)
    response.headers.update(headers)
    return response


def error_body(message: str, status: int, code: str) -> dict[str, dict[str, str]]:
    """The body for an error, also for inside a stream."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "code": code}}


def _classify(error: Exception, busy_status: int) -> tuple[int, str, dict[str, str]]:
    if isinstance(error, HTTPException):
        return error.status_code, _http_code(error.status_code), dict(error.headers or {})
    if isinstance(error, errors.PermissionDenied):
        if error.authenticated:
            return 403, "permission_denied", {}
        return 401, "invalid_api_key", {"WWW-Authenticate": "Bearer"}
    if isinstance(error, errors.UpstreamError):
        return error.status, error.code, _retry_after(error)
    for kind, status, code in _KNOWN:
        if isinstance(error, kind):
            return (busy_status if kind is errors.Unavailable else status), code, _retry_after(error)
    return 500, "internal_error", {}


def _retry_after(error: Exception) -> dict[str, str]:
    if isinstance(error, errors.Unavailable | errors.UpstreamError) and error.retry_after_s is not None:
        return {
            "Retry-After": str(max(1, math.ceil(error.retry_after_s))),
            "Retry-After-Ms": str(math.ceil(1000 * error.retry_after_s)),  # the OpenAI SDK prefers it
        }
    if isinstance(error, errors.StoreError):
        return {"Retry-After": str(math.ceil(STORE_RETRY_S))}
    return {}


def _http_code(status: int) -> str:
    return {
        404: "not_found",
        405: "method_not_allowed",
        413: "body_too_large",
        415: "unsupported_media_type",
    }.get(status, "invalid_request")


async def on_error(_request: Request, error: Exception) -> Response:
    """Starlette exception handler for everything."""
    return error_response(error)
