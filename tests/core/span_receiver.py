"""A real HTTP server that takes OTLP/HTTP as JSON and protobuf, for tests of the tracers and adapters."""

from __future__ import annotations

import base64
import gzip
import json
import threading
from collections import deque
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agentlightning.otlp import spans_from_request
from agentlightning.types import Span


class SpanReceiver:
    """Collects spans; answers with the statuses in `answers` first, then with 200."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.headers: list[dict[str, str]] = []
        self.answers: deque[tuple[int, bytes]] = deque()
        self.max_bytes = 2**30
        self.hold = threading.Event()
        self.hold.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()

    def respond(self, handler: BaseHTTPRequestHandler, headers: dict[str, str], body: bytes) -> None:
        send(handler, *self.take(handler.path, headers, body))

    def take(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        self.hold.wait(30)
        self.headers.append({**headers, ":path": path})
        if self.answers:
            status, answer = self.answers.popleft()
            if status != 200:
                return status, answer
        else:
            answer = b"{}"
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        if len(body) > self.max_bytes:
            return 413, b""
        is_json = headers.get("content-type", "").startswith("application/json")
        self.spans.extend(spans_from_request(json.loads(body) if is_json else _protobuf_as_json(body)))
        return 200, answer if is_json else b""


def _protobuf_as_json(body: bytes) -> object:
    """The protobuf request in OTLP/JSON, which writes ids as hex where protobuf's own JSON has base64."""
    request = ExportTraceServiceRequest.FromString(body)
    tree: Any = MessageToDict(request)
    for group in tree.get("resourceSpans", []):
        for scope in group.get("scopeSpans", []):
            for span in scope.get("spans", []):
                for item in [span, *span.get("links", [])]:
                    for key in ("traceId", "spanId", "parentSpanId"):
                        if key in item:
                            item[key] = base64.b64decode(item[key]).hex()
    return tree


def _handler(receiver: SpanReceiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {key.lower(): value for key, value in self.headers.items()}
            receiver.respond(self, headers, body)

        def log_message(self, format: str, *args: object) -> None: ...

    return Handler


def send(handler: BaseHTTPRequestHandler, status: int, answer: bytes, **headers: str) -> None:
    """Write a whole answer."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("content-length", str(len(answer)))
    handler.end_headers()
    handler.wfile.write(answer)


def without_ids_and_times(spans: list[Span]) -> list[Span]:
    """The spans by name, without what differs from run to run; parents by name."""
    names = {span.span_id: span.name for span in spans}
    bare = [
        replace(
            span,
            trace_id="",
            span_id="",
            parent_id=names.get(span.parent_id or "", span.parent_id),
            start_ns=0,
            end_ns=0,
            events=tuple(replace(event, time_ns=0) for event in span.events),
        )
        for span in spans
    ]
    return sorted(bare, key=lambda span: (span.name, str(span.attributes)))
