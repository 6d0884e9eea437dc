"""HTTP routes of the gateway: OpenAI's chat completions and models, plain or under a rollout's own path.

A request for a routed model name is passed on unread: what an upstream takes is for the upstream to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping
from typing import Any, TypeVar, cast

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from agentlightning import semconv
from agentlightning.errors import InvalidInput, NotFound
from agentlightning.types import JsonObject
from agentlightning_server.auth import Principal, guard_attempt, guard_model, principal
from agentlightning_server.gateway.recording import Caller
from agentlightning_server.gateway.requests import includes_usage, parse_chat_request
from agentlightning_server.gateway.responses import chat_completion, events
from agentlightning_server.gateway.service import Gateway
from agentlightning_server.http_errors import BUSY_MODEL, error_response, json_response

T = TypeVar("T")
WRITE_BYTES = 16 * 1024  # of a stream at a time
ATTEMPT_PREFIX = "/rollouts/{rollout}/attempts/{attempt}"


def gateway_routes(gateway: Gateway) -> list[Route]:
    """Routes to mount in the server's app."""

    async def chat(request: Request) -> Response:
        fields = _decoded(await request.body())
        caller = _caller(request, principal(request))
        routed = fields.get("model") in gateway.upstreams
        answering = gateway.forward(fields, caller) if routed else _sampled(gateway, fields, caller)
        try:
            body = await _unless_gone(request, answering)
        except Exception as error:
            # 429 where it is busy: the OpenAI SDK waits as Retry-After says and asks again. What nobody
            # foresaw is answered here too: further up, Starlette raises it again and the connection is
            # closed, which fails the client's next request as well.
            return error_response(error, busy_status=BUSY_MODEL)
        if body is None:
            return Response(status_code=499)  # nobody is there to read it
        return _respond(fields, body)

    async def models(_: Request) -> Response:
        data = [_model(name, policy_version=version) for name, version in gateway.models]
        data += [_model(name) for name in gateway.upstreams.models]
        return json_response({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        name: str = request.path_params["model"]
        if name in gateway.upstreams:
            return json_response(_model(name))
        policy = gateway.policy_of(name)
        return json_response(_model(policy, policy_version=dict(gateway.models)[policy]))

    async def responses(_: Request) -> Response:
        raise NotFound(
            "this server speaks chat completions: use /v1/chat/completions (with the OpenAI Agents SDK the "
            "adapter sees to it, or set_default_openai_api('chat_completions'))"
        )

    prefixes = ("", ATTEMPT_PREFIX)
    # First, since routes are tried in their order.
    routes = [Route(f"{prefix}/v1/chat/completions", chat, methods=["POST"]) for prefix in prefixes]
    for prefix in prefixes:
        routes.append(Route(f"{prefix}/v1/responses", responses, methods=["POST"]))
        routes.append(Route(f"{prefix}/v1/models", models, methods=["GET"]))
        routes.append(Route(f"{prefix}/v1/models/{{model:path}}", model, methods=["GET"]))
    return routes


async def _sampled(gateway: Gateway, fields: JsonObject, caller: Caller) -> dict[str, Any]:
    """The body of the engine's answer."""
    asked = parse_chat_request(fields)
    return chat_completion(asked, await gateway.complete(asked, caller), gateway.prompts)


def _decoded(body: bytes) -> JsonObject:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the request body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidInput("the request body must be a JSON object")
    return cast("JsonObject", fields)


def _caller(request: Request, who: Principal) -> Caller:
    """Whose call this is: the path, else the headers of the SDK patch, else the attempt's key, else live."""
    headers = dict[bytes, bytes](request.scope["headers"])  # looked up four times
    rollout = request.path_params.get("rollout") or _header(headers, semconv.HEADER_ROLLOUT)
    attempt = request.path_params.get("attempt") or _header(headers, semconv.HEADER_ATTEMPT)
    guard_model(who)
    guard_attempt(who, rollout, attempt)
    rollout, attempt = rollout or who.rollout_id, attempt or who.attempt_id
    traceparent = _header(headers, semconv.HEADER_TRACEPARENT) or _header(headers, "traceparent")
    return Caller.of(traceparent, rollout, attempt, who.project)


def _header(headers: Mapping[bytes, bytes], name: str) -> str | None:
    value = headers.get(name.encode())
    return None if value is None else value.decode("latin-1")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None, with the work cancelled, when the client disconnects first."""
    answering = asyncio.current_task()
    assert answering is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        answering.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not gone:  # the server ends
            raise
        answering.uncancel()
        return None
    finally:
        watching.cancel()


def _respond(fields: JsonObject, body: dict[str, Any]) -> Response:
    headers = {"x-request-id": str(body["id"])}
    if fields.get("stream") is True:
        chunks = _batched(events(body, include_usage=includes_usage(fields)))
        return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
    response = json_response(body)
    response.headers.update(headers)
    return response


async def _batched(chunks: Iterator[bytes]) -> AsyncGenerator[bytes]:
    """Events joined into larger writes, since the whole answer is there: one each would cost far more.

    Not a plain iterator, for each step of which Starlette would ask another thread.
    """
    batch: list[bytes] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk)
        if size >= WRITE_BYTES:
            yield b"".join(batch)
            batch, size = [], 0
    yield b"".join(batch)


def _model(name: str, **more: object) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "agentlightning", **more}
