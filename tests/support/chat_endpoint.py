"""A scripted OpenAI-compatible endpoint, for tests of what passes requests on: it answers and keeps them."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Self

STALL: Final = object()
"""No answer comes; `ChatEndpoint.left` is set once the client has closed the connection."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is no chat completion."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came in."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


def completion(*messages: dict[str, Any], finish_reason: str = "stop", **more: Any) -> dict[str, Any]:
    """A `chat.completion` with these messages as its choices."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", **message},
            "finish_reason": finish_reason,
            "logprobs": None,
        }
        for i, message in enumerate(messages)
    ]
    return {
        "id": "chatcmpl-hosted-1",
        "object": "chat.completion",
        "created": 1,
        "model": "big-2026-01-01",
        "system_fingerprint": "fp_1",
        "choices": choices,
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
        **more,
    }


class ChatEndpoint:
    """`script.append(completion({"content": "hi"}))` answers one request; without a script it says "ok"."""

    def __init__(self) -> None:
        self.script: deque[Any] = deque()
        self.received: list[Received] = []
        self.stalled = threading.Event()
        self.left = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self._respond))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _respond(self, handler: BaseHTTPRequestHandler, received: Received) -> None:
        self.received.append(received)
        answer = self.script.popleft() if self.script else completion({"content": "ok"})
        if answer is STALL:
            self.stalled.set()
            handler.connection.settimeout(20)
            if handler.connection.recv(1) == b"":
                self.left.set()
            handler.close_connection = True
            return
        refusal = answer if isinstance(answer, Refusal) else Refusal(200, answer)
        _send(handler, refusal)


def _send(handler: BaseHTTPRequestHandler, answer: Refusal) -> None:
    body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
    handler.send_response(answer.status)
    for name, value in {"content-type": "application/json", **answer.headers}.items():
        handler.send_header(name, value)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _handler(
    respond: Callable[[BaseHTTPRequestHandler, Received], None],
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else the body waits 40 ms for the head's acknowledgement

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {key.lower(): value for key, value in self.headers.items()}
            respond(self, Received(self.path, headers, json.loads(body)))

        def log_message(self, format: str, *args: object) -> None: ...

    return Handler
