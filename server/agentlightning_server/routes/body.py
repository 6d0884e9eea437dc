"""Reading request bodies within bounds, compressed and inflated alike.

Invariant: no more than the limit (plus one chunk) is ever in memory, whatever the client claims to send.
"""

from __future__ import annotations

import zlib
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request

from agentlightning.errors import InvalidInput

_GZIP = 31  # zlib's window bits for gzip with the largest window


async def read_body(request: Request, limit: int) -> bytes:
    """The body, inflated when gzipped. Raises HTTPException 413 or 415, InvalidInput for broken gzip."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("gzip", "identity", ""):
        raise HTTPException(415, f"Content-Encoding {encoding!r} is not taken: use gzip or none")
    _check_declared(request, limit)
    inflate = _Gunzip(limit) if encoding == "gzip" else None
    chunks: list[bytes] = []
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise too_large(limit)
        chunks.append(inflate.feed(chunk) if inflate else chunk)
    if inflate:
        inflate.finish(received)
    return b"".join(chunks)


async def read_json(request: Request, limit: int) -> Any:
    """The body as JSON. Raises as `read_body`, and InvalidInput for anything but JSON."""
    body = await read_body(request, limit)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error


def too_large(limit: int) -> HTTPException:
    """413 with the limit in it."""
    return HTTPException(413, f"the body is larger than {limit // (1024 * 1024)} MiB: send it in parts")


def _check_declared(request: Request, limit: int) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large(limit)


class _Gunzip:
    """Inflates a stream of gzip members up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inflated = 0
        self._member = zlib.decompressobj(_GZIP)

    def feed(self, chunk: bytes) -> bytes:
        parts: list[bytes] = []
        while chunk:
            if self._member.eof:
                self._member = zlib.decompressobj(_GZIP)
            try:
                part = self._member.decompress(chunk, self._limit - self._inflated + 1)
            except zlib.error as error:
                raise InvalidInput(f"the body is not gzip, as its Content-Encoding says: {error}") from error
            self._inflated += len(part)
            if self._inflated > self._limit:
                raise too_large(self._limit)
            parts.append(part)
            chunk = self._member.unused_data or self._member.unconsumed_tail
        return b"".join(parts)

    def finish(self, received: int) -> None:
        if received and not self._member.eof:
            raise InvalidInput("the gzip body ends early: send it again, whole")
