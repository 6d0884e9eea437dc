"""An OpenAI-compatible server that replays a script, and takes spans on the same origin, as ours does.

Scripts are queues by model name, so that concurrent agents cannot take each other's replies.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Self

from tests.core.span_receiver import SpanReceiver, send


@dataclass(frozen=True)
class Reply:
    """What the server answers to one request."""

    message: dict[str, Any]
    finish_reason: str = "stop"
    status: int = 200
    stall: bool = False


@dataclass
class Request:
    """A chat request that arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    reply: Reply = field(default_factory=lambda: say("ok"))
    response_id: str = ""


def say(text: str, finish_reason: str = "stop") -> Reply:
    return Reply({"role": "assistant", "content": text}, finish_reason)


def call(*calls: tuple[str, dict[str, Any] | str], text: str | None = None) -> Reply:
    """Tool calls: name and arguments, the arguments as a dict or as text that need not parse."""
    return Reply(
        {
            "role": "assistant",
            "content": text,
            "tool_calls": [
                {
                    "id": f"call_{name}_{i}",
                    "type": "function",
                    "function": {
                        "name": name,
                        "arguments": args if isinstance(args, str) else json.dumps(args),
                    },
                }
                for i, (name, args) in enumerate(calls)
            ],
        },
        "tool_calls",
    )


def fail(status: int) -> Reply:
    return Reply({}, status=status)


def stall() -> Reply:
    """Answers only after `ScriptedServer.release` is set."""
    return Reply({"role": "assistant", "content": "late"}, stall=True)


class ScriptedServer(SpanReceiver):
    """`script["m"].append(say("hi"))` answers model "m" once; without a script every answer is "ok"."""

    def __init__(self) -> None:
        super().__init__()
        self.script: defaultdict[str, deque[Reply]] = defaultdict(deque)
        self.requests: list[Request] = []
        self.stalled = threading.Event()
        self.release = threading.Event()
        self._numbers = itertools.count(1)

    def __exit__(self, *_: object) -> None:
        self.release.set()
        super().__exit__()

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    def given(self, *replies: Reply, model: str = "m") -> Self:
        self.script[model].extend(replies)
        return self

    def respond(self, handler: BaseHTTPRequestHandler, headers: dict[str, str], body: bytes) -> None:
        if handler.path.endswith("/traces"):
            super().respond(handler, headers, body)
            return
        request = Request(handler.path, headers, json.loads(body))
        replies = self.script[request.body["model"]]
        request.reply = replies.popleft() if replies else say("ok")
        number = next(self._numbers)
        request.response_id = f"chatcmpl-{number}"
        for tool_call in request.reply.message.get("tool_calls", []):
            tool_call["id"] = f"{tool_call['id']}_{number}"
        self.requests.append(request)
        if request.reply.stall:
            self.stalled.set()
            self.release.wait(30)
        self._answer(handler, request)

    def _answer(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        if request.reply.status != 200:
            error = {
                "error": {"message": f"scripted {request.reply.status}", "type": "scripted", "code": None}
            }
            send(handler, request.reply.status, json.dumps(error).encode(), retry_after_ms="1")
        elif request.body.get("stream"):
            handler.send_response(200)
            handler.send_header("content-type", "text/event-stream")
            handler.send_header("connection", "close")
            handler.end_headers()
            for event in _events(request):
                handler.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            handler.wfile.write(b"data: [DONE]\n\n")
            handler.close_connection = True
        else:
            send(handler, 200, json.dumps(_completion(request)).encode(), content_type="application/json")


USAGE = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}


def _head(request: Request, kind: str) -> dict[str, Any]:
    return {"id": request.response_id, "object": kind, "created": 1, "model": request.body["model"]}


def _completion(request: Request) -> dict[str, Any]:
    choice = {"index": 0, "message": request.reply.message, "finish_reason": request.reply.finish_reason}
    return {**_head(request, "chat.completion"), "choices": [choice], "usage": USAGE}


def _events(request: Request) -> Iterator[dict[str, Any]]:
    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {**_head(request, "chat.completion.chunk"), "choices": [choice]}

    message = request.reply.message
    yield chunk({"role": "assistant", "content": ""})
    text = message.get("content") or ""
    for part in (text[: len(text) // 2], text[len(text) // 2 :]):
        if part:
            yield chunk({"content": part})
    for i, tool_call in enumerate(message.get("tool_calls", [])):
        arguments: str = tool_call["function"]["arguments"]
        start = {**tool_call, "index": i, "function": {**tool_call["function"], "arguments": ""}}
        yield chunk({"tool_calls": [start]})
        yield chunk({"tool_calls": [{"index": i, "function": {"arguments": arguments}}]})
    yield chunk({}, request.reply.finish_reason)
    options: dict[str, Any] = request.body.get("stream_options") or {}
    if options.get("include_usage"):
        yield {**_head(request, "chat.completion.chunk"), "choices": [], "usage": USAGE}
