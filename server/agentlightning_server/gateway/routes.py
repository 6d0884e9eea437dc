"""HTTP routes of the gateway: OpenAI's chat completions and models, plain or under a rollout's own path."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from agentlightning import semconv
from agentlightning.errors import InvalidInput, Unavailable
from agentlightning_server.auth import Principal, guard_attempt, principal
from agentlightning_server.gateway.recording import Caller
from agentlightning_server.gateway.requests import ChatRequest, parse_chat_request
from agentlightning_server.gateway.responses import Answer, chat_completion, events
from agentlightning_server.gateway.service import Gateway
from agentlightning_server.http_errors import BUSY_MODEL, error_response, json_response

ATTEMPT_PREFIX = "/rollouts/{rollout}/attempts/{attempt}"


def gateway_routes(gateway: Gateway) -> list[Route]:
    """Routes to mount in the server's app."""

    async def chat(request: Request) -> Response:
        asked = parse_chat_request(_decoded(await request.body()))
        caller = _caller(request, principal(request))
        try:
            answer = await _unless_gone(request, gateway.complete(asked, caller))
        except Unavailable as error:  # 429: the OpenAI SDK waits as Retry-After says and asks again
            return error_response(error, busy_status=BUSY_MODEL)
        if answer is None:
            return Response(status_code=499)  # nobody is there to read it
        return _respond(asked, answer, gateway)

    async def models(_: Request) -> Response:
        data = [_model(name, version) for name, version in gateway.models]
        return json_response({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        policy = gateway.policy_of(request.path_params["model"])
        return json_response(_model(policy, dict(gateway.models)[policy]))

    routes: list[Route] = []
    for prefix in ("", ATTEMPT_PREFIX):
        routes.append(Route(f"{prefix}/v1/chat/completions", chat, methods=["POST"]))
        routes.append(Route(f"{prefix}/v1/models", models, methods=["GET"]))
        routes.append(Route(f"{prefix}/v1/models/{{model:path}}", model, methods=["GET"]))
    return routes


def _decoded(body: bytes) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the request body is not JSON: {error}") from error


def _caller(request: Request, who: Principal) -> Caller:
    """Whose call this is: the path, else the headers of the SDK patch, else the attempt's key, else live."""
    rollout = request.path_params.get("rollout") or request.headers.get(semconv.HEADER_ROLLOUT)
    attempt = request.path_params.get("attempt") or request.headers.get(semconv.HEADER_ATTEMPT)
    guard_attempt(who, rollout, attempt)
    rollout, attempt = rollout or who.rollout_id, attempt or who.attempt_id
    traceparent = request.headers.get(semconv.HEADER_TRACEPARENT) or request.headers.get("traceparent")
    return Caller.of(traceparent, rollout, attempt)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer | None:
    """The result of `work`; None, with the work cancelled, when the client disconnects first."""
    answering = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        answering.cancel()
        await asyncio.wait({answering})
        return None
    finally:
        watching.cancel()
        if not answering.done():
            answering.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _respond(asked: ChatRequest, answer: Answer, gateway: Gateway) -> Response:
    headers = {"x-request-id": answer.response_id}
    if asked.stream:
        body = events(asked, answer, gateway.prompts)
        return StreamingResponse(body, media_type="text/event-stream", headers=headers)
    response = json_response(chat_completion(asked, answer, gateway.prompts))
    response.headers.update(headers)
    return response


def _model(name: str, version: int) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "agentlightning",
        "policy_version": version,
    }
