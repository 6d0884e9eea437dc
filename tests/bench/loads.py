"""Servers in processes of their own, and clients that cost little, for measuring what a server costs.

What is told is work per second of the server's own CPU time, which other jobs on the machine change less than
time on the wall.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a load came to."""

    requests: int
    seconds: float
    cpu_seconds: float
    """Of the server's process."""
    median_ms: float

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def per_cpu_second(self) -> float:
        return self.requests / self.cpu_seconds


@contextmanager
def process(script: str, *arguments: str) -> Generator[tuple[str, int]]:
    """Run a Python script that prints the URL it serves; the URL and its process id."""
    command = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as running:
        assert running.stdout is not None
        try:
            url = running.stdout.readline().strip()
            assert url, "the server did not start"
            yield url, running.pid
        finally:
            running.terminate()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def http_request(path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """A POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer key\r\n"
    head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def load(url: str, pid: int, requests: Sequence[bytes], connections: int) -> Measured:
    """Send all requests over so many connections, each answered before the next."""
    began, began_cpu = time.perf_counter(), cpu_seconds(pid)
    times = asyncio.run(_send_all(url, requests, connections))
    seconds = time.perf_counter() - began
    times.sort()
    return Measured(len(requests), seconds, cpu_seconds(pid) - began_cpu, 1e3 * times[len(times) // 2])


async def _send_all(url: str, requests: Sequence[bytes], connections: int) -> list[float]:
    waiting = iter(requests)
    times: list[float] = []
    await asyncio.gather(*(_send(url, waiting.__next__, times) for _ in range(connections)))
    return times


async def _send(url: str, following: Callable[[], bytes], times: list[float]) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 22)
    try:
        while True:
            try:
                request = following()
            except StopIteration:
                return
            began = time.perf_counter()
            writer.write(request)
            await _answer(reader)
            times.append(time.perf_counter() - began)
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 2"):
        raise RuntimeError(head.decode())
    if b"transfer-encoding: chunked" in head:
        while (size := int(await reader.readline(), 16)) > 0:
            await reader.readexactly(size + 2)
        await reader.readline()
        return
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    await reader.readexactly(length)
