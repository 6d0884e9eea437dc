"""The API described in OpenAPI 3.1, for tools that read such descriptions, fuzzers among them.

Written by hand beside the routes; a test compares the two. Bodies are described as far as they are checked.
"""

from __future__ import annotations

from typing import Any, Final

from agentlightning._version import __version__
from agentlightning.types import AttemptStatus, Mode, RolloutStatus

from ..store import Scope

_TEXT: Final = {"type": "string"}
_ID: Final = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._:~@=+-]{0,254}$"}
_SECONDS: Final = {"type": "number", "minimum": 0, "maximum": 0.2}  # of a long poll; more is allowed
_NUMBER: Final = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_WORKER: Final = {"type": "string", "minLength": 1, "maxLength": 200}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _array(items: dict[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


def _one_of(kind: Any) -> dict[str, Any]:
    return {"type": "string", "enum": [str(member) for member in kind]}


_TASK: Final = _object(["id"], id=_TEXT, input={}, split=_TEXT)
_ROLLOUT: Final = _object(
    ["id"],
    id=_ID,
    task=_nullable(_TASK),
    group_id=_TEXT,
    mode=_one_of(Mode),
    policy_version=_nullable(_NUMBER),
    limits=_object(
        [],
        start_to_close_s={"type": "number", "minimum": 0.001, "maximum": 1e6},
        max_attempts={"type": "integer", "minimum": 1, "maximum": 1000},
    ),
    run_id=_nullable(_TEXT),
)
_REWARD: Final = _object(
    ["value"],
    value={"type": "number", "minimum": -1e30, "maximum": 1e30},
    name=_TEXT,
    target=_nullable(_TEXT),
    time_ns=_NUMBER,
)
_ERROR: Final = _object(
    ["error"], error=_object(["message", "type", "code"], message=_TEXT, type=_TEXT, code=_TEXT)
)
_SPANS: Final = _object([], resourceSpans=_array({"type": "object"}))
_CHAT: Final = _object(
    ["model", "messages"],
    model=_TEXT,
    messages=_array(
        _object(["role", "content"], role={"enum": ["system", "user", "assistant"]}, content=_TEXT), 1
    ),
    max_tokens={"type": "integer", "minimum": 1, "maximum": 4},
    temperature={"type": "number", "minimum": 0, "maximum": 2},
    stream={"type": "boolean"},
)


def _operation(
    what: str,
    body: dict[str, Any] | None = None,
    *,
    status: int = 200,
    content: str = "application/json",
    query: dict[str, Any] | None = None,
    path: tuple[str, ...] = (),
    open_to_all: bool = False,
) -> dict[str, Any]:
    answers: dict[str, Any] = {str(status): {"description": "done", "content": {content: {}}}}
    answers["default"] = {
        "description": "refused, with the reason",
        "content": {"application/json": {"schema": _ERROR}},
    }
    parameters = [{"name": n, "in": "path", "required": True, "schema": _TEXT} for n in path]
    parameters += [{"name": n, "in": "query", "schema": s} for n, s in (query or {}).items()]
    described: dict[str, Any] = {"summary": what, "responses": answers, "parameters": parameters}
    if body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if open_to_all:
        described["security"] = []
    return described


_LISTING: Final = {
    "run_id": _TEXT,
    "status": _one_of(RolloutStatus),
    "mode": _one_of(Mode),
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
    "after": _TEXT,
}
_FINISH: Final = _object(
    ["worker_id", "status"],
    worker_id=_WORKER,
    status={"enum": [str(status) for status in AttemptStatus if status is not AttemptStatus.RUNNING]},
    error=_nullable(_TEXT),
    rewards=_array(_REWARD),
)
_CLAIM: Final = _object(
    ["worker_id"],
    worker_id=_WORKER,
    max={"type": "integer", "minimum": 1, "maximum": 256},
    wait_s=_SECONDS,
)
_KEY: Final = _object(
    ["scope"],
    scope={"enum": [str(scope) for scope in Scope if scope is not Scope.ATTEMPT]},
    name={"type": "string", "maxLength": 100},
    expires_in_s={"type": "number", "minimum": 0, "maximum": 1e6},
)
_OWN: Final = ("rollout", "attempt")
_OWN_PATH: Final = "/rollouts/{rollout}/attempts/{attempt}"
_METRICS: Final = "text/plain"

_PATHS: Final[dict[str, dict[str, Any]]] = {
    "/healthz": {"get": _operation("Whether the process answers.", open_to_all=True)},
    "/readyz": {"get": _operation("Whether the server can work.", open_to_all=True)},
    "/metrics": {"get": _operation("Metrics for Prometheus.", content=_METRICS)},
    "/openapi.json": {"get": _operation("This description.")},
    "/v1/traces": {"post": _operation("Store spans (OTLP/HTTP, also in protobuf).", _SPANS)},
    f"{_OWN_PATH}/v1/traces": {"post": _operation("Store spans of an attempt.", _SPANS, path=_OWN)},
    "/v1/chat/completions": {"post": _operation("Ask the model (OpenAI's API).", _CHAT)},
    f"{_OWN_PATH}/v1/chat/completions": {
        "post": _operation("Ask the model for an attempt.", _CHAT, path=_OWN)
    },
    "/v1/models": {"get": _operation("The models that are served.")},
    f"{_OWN_PATH}/v1/models": {"get": _operation("The models that are served.", path=_OWN)},
    "/v1/models/{model}": {"get": _operation("One model.", path=("model",))},
    f"{_OWN_PATH}/v1/models/{{model}}": {"get": _operation("One model.", path=(*_OWN, "model"))},
    "/api/rollouts": {
        "post": _operation(
            "Queue rollouts.", _object(["rollouts"], rollouts=_array(_ROLLOUT, 1)), status=201
        ),
        "get": _operation("A page of rollouts, oldest first.", query=_LISTING),
    },
    "/api/rollouts/wait": {
        "post": _operation(
            "Those that are final, as soon as all are.",
            _object(["ids"], ids=_array(_TEXT), timeout_s=_SECONDS),
        )
    },
    "/api/rollouts/{id}": {"get": _operation("One rollout with its attempts.", path=("id",))},
    "/api/rollouts/{id}/cancel": {
        "post": _operation("End a rollout and its attempt.", _object([]), path=("id",))
    },
    "/api/rollouts/{id}/rewards": {
        "post": _operation("Reward an attempt, or a call of it.", _REWARD, path=("id",), status=201)
    },
    "/api/rollouts/{id}/spans": {
        "get": _operation("Spans of an attempt.", path=("id",), query={"attempt_id": _TEXT})
    },
    "/api/claims": {"post": _operation("Lease rollouts, waiting for them.", _CLAIM)},
    "/api/attempts/{id}/heartbeat": {
        "post": _operation("Renew a lease.", _object(["worker_id"], worker_id=_WORKER), path=("id",))
    },
    "/api/attempts/{id}/finish": {"post": _operation("End an attempt.", _FINISH, path=("id",))},
    "/api/keys": {
        "post": _operation("Make a key; it is shown only here.", _KEY, status=201),
        "get": _operation("The project's keys."),
    },
    "/api/keys/{id}": {"delete": _operation("Revoke a key.", path=("id",))},
}

DESCRIPTION: Final[dict[str, Any]] = {
    "openapi": "3.1.0",
    "info": {"title": "Agent Lightning", "version": __version__},
    "security": [{"key": []}],
    "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    "paths": _PATHS,
}
