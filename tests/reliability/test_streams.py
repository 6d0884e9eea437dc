"""Clients that leave, of streams and of waiting requests, leave nothing behind (R18)."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.support.chat_endpoint import STALL, ChatEndpoint, completion
from tests.support.scale import scaled
from tests.support.serving import tiny_engine
from tests.support.waiting import wait_until

from agentlightning_server.settings import Settings
from agentlightning_server.training.local import LocalServer, local_server

STREAMS = scaled(60, 1000)
AT_ONCE = 20


@pytest.fixture(scope="module")
def endpoint() -> Generator[ChatEndpoint]:
    with ChatEndpoint() as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, endpoint: ChatEndpoint) -> Generator[LocalServer]:
    folder = tmp_path_factory.mktemp("streams")
    table = folder / "upstreams.json"
    table.write_text(json.dumps({"hosted": {"url": endpoint.url}}))
    settings = Settings(port=0, database=folder / "store.db", upstreams=table)
    with local_server(tiny_engine(folder), settings) as running:
        yield running


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def in_flight(server: LocalServer) -> float:
    text = httpx.get(server.url + "/metrics", headers={"Authorization": f"Bearer {server.key}"}).text
    (line,) = [x for x in text.splitlines() if x.startswith("agentlightning_http_requests_in_flight ")]
    return float(line.split()[1]) - 1  # this one


def ask_and_leave(server: LocalServer, body: dict[str, Any], after: bytes) -> None:
    """Send a request on a socket, wait until the answer has `after` in it, and close it in the middle."""
    host = urlsplit(server.url)
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((host.hostname, host.port), timeout=30) as connection:
        # RST instead of FIN: the rudest way to leave.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(head.encode() + content)
        seen = b""
        while after not in seen:
            part = connection.recv(4096)
            assert part, seen
            seen += part


def request(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}


@pytest.mark.parametrize("upstream", [False, True], ids=["policy", "upstream"])
def test_streams_left_in_the_middle_leak_nothing(
    server: LocalServer, endpoint: ChatEndpoint, upstream: bool
) -> None:
    body = request("hosted" if upstream else "policy", stream=True, max_tokens=4)

    def leave(_number: int) -> None:
        if upstream:
            endpoint.script.append(completion({"content": "x" * 200_000}))
        ask_and_leave(server, body, b"data: {")

    leave(0)
    wait_until(lambda: in_flight(server) == 0)
    files, threads = open_files(), threading.active_count()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(leave, range(STREAMS)))
    wait_until(lambda: in_flight(server) == 0)
    wait_until(lambda: open_files() <= files + 2 * AT_ONCE)  # kept-alive connections to the upstream
    assert threading.active_count() <= threads + 40  # the pool of the event loop, which is bounded
    endpoint.script.clear()


def test_waiting_requests_that_are_left_end_at_the_upstream_within_a_second(
    server: LocalServer, endpoint: ChatEndpoint
) -> None:
    for _ in range(scaled(3, 50)):
        endpoint.stalled.clear()
        endpoint.left.clear()
        endpoint.script.append(STALL)
        host = urlsplit(server.url)
        content = json.dumps(request("hosted")).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
        with socket.create_connection((host.hostname, host.port), timeout=30) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            assert endpoint.stalled.wait(20)
        assert endpoint.left.wait(5)
    wait_until(lambda: in_flight(server) == 0)


def test_a_client_that_reads_slowly_holds_up_nobody_else(server: LocalServer, endpoint: ChatEndpoint) -> None:
    endpoint.script.append(completion({"content": "x" * 600_000}))
    host = urlsplit(server.url)
    content = json.dumps(request("hosted", stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    with socket.create_connection((host.hostname, host.port), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        connection.recv(100)  # and no more for now
        endpoint.script.append(completion({"content": "quick"}))
        answer = httpx.post(
            server.url + "/v1/chat/completions",
            json=request("hosted"),
            headers={"Authorization": f"Bearer {server.key}"},
            timeout=10,
        )
        assert answer.json()["choices"][0]["message"]["content"] == "quick"
        seen = b""
        while b"[DONE]" not in seen[-100:]:
            seen = seen[-200:] + connection.recv(1 << 20)
    wait_until(lambda: in_flight(server) == 0)
