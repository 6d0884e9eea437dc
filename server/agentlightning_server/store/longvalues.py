"""Long values of spans, kept once: an episode of n turns takes O(n) space and not O(n²).

Each turn's prompt repeats the one before, as messages and as token ids. A long value is cut into pieces of
1 KiB; a piece is stored under the hash of itself and of the piece before it, so that two values share
exactly the pieces of their common beginning. The span keeps the hash of its last whole piece and what is left
over, whatever the value's length.

    value = piece ── piece ── piece ── rest        parts of the span: (where, hash of the last piece, rest)

Pieces belong to a rollout and are deleted with it.
Invariant: `join` gives the very bytes that `cut` was given.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2 as pb

from agentlightning.errors import StoreError

CHUNK_BYTES = 1024
MIN_BYTES = 2 * CHUNK_BYTES  # shorter values are left as they are
MIN_BODY_BYTES = (
    4 * CHUNK_BYTES
)  # and so are shorter spans, which it would cost more to look at than it saves
HASH_BYTES = 16
_TEXT, _BYTES = 0, 1
_PART = struct.Struct(f"<HBI{HASH_BYTES}s")  # attribute's index, kind, bytes of the rest, hash


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a long value."""

    hash: bytes
    parent: bytes | None
    data: bytes


def cut(body: bytes) -> tuple[bytes, bytes | None, list[Chunk]]:
    """A span's protobuf without its long values, where those are, and their pieces.

    A span without long values comes back as it is.
    """
    if len(body) < MIN_BODY_BYTES:
        return body, None, []
    span = pb.Span.FromString(body)
    parts: list[bytes] = []
    chunks: list[Chunk] = []
    for index, pair in enumerate(span.attributes):
        kind, value = _long(pair.value)
        if value is not None and index < 1 << 16:
            last, rest = _chain(value, chunks)
            parts.append(_PART.pack(index, kind, len(rest), last) + rest)
            pair.value.Clear()
    if not parts:
        return body, None, []
    return span.SerializeToString(), b"".join(parts), chunks


def _long(value: AnyValue) -> tuple[int, bytes | None]:
    if len(value.string_value) >= CHUNK_BYTES:  # characters, so never more than there are bytes
        encoded = value.string_value.encode()
        return (_TEXT, encoded) if len(encoded) >= MIN_BYTES else (_TEXT, None)
    return (_BYTES, value.bytes_value) if len(value.bytes_value) >= MIN_BYTES else (_BYTES, None)


def _chain(value: bytes, chunks: list[Chunk]) -> tuple[bytes, bytes]:
    parent: bytes | None = None
    whole = len(value) - len(value) % CHUNK_BYTES
    for start in range(0, whole, CHUNK_BYTES):
        data = value[start : start + CHUNK_BYTES]
        chunk = Chunk(blake2b((parent or b"") + data, digest_size=HASH_BYTES).digest(), parent, data)
        chunks.append(chunk)
        parent = chunk.hash
    assert parent is not None  # a long value has a whole piece
    return parent, value[whole:]


def join(body: bytes, parts: bytes, stored: Mapping[bytes, tuple[bytes | None, bytes]]) -> bytes:
    """The span's protobuf as it was; `stored` are (parent, data) by hash.

    Raises StoreError for a lost piece.
    """
    span = pb.Span.FromString(body)
    for index, kind, last, rest in _read(parts):
        value = b"".join(reversed(list(_walk(last, stored)))) + rest
        if kind == _TEXT:
            span.attributes[index].value.string_value = value.decode()
        else:
            span.attributes[index].value.bytes_value = value
    return span.SerializeToString()


def last_hashes(parts: bytes) -> list[bytes]:
    """The hashes that the parts of a span end in."""
    return [last for _, _, last, _ in _read(parts)]


def _read(parts: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    at = 0
    while at < len(parts):
        index, kind, size, last = _PART.unpack_from(parts, at)
        at += _PART.size
        yield index, kind, last, parts[at : at + size]
        at += size


def _walk(last: bytes | None, stored: Mapping[bytes, tuple[bytes | None, bytes]]) -> Iterator[bytes]:
    while last is not None:
        if last not in stored:
            raise StoreError(
                "a piece of a long value is missing: run `agl store check`, restore from a backup"
            )
        last, data = stored[last]
        yield data


def joined_rows(
    rows: Sequence[Mapping[str, object]],
    stored: Callable[[], Mapping[bytes, tuple[bytes | None, bytes]]],
) -> list[dict[str, object]]:
    """Rows of spans (head, body, parts and ids) with their long values back in place."""
    pieces: Mapping[bytes, tuple[bytes | None, bytes]] | None = None
    whole: list[dict[str, object]] = []
    for row in rows:
        fields = dict(row)
        parts, body = fields.pop("parts"), fields["body"]
        if isinstance(parts, bytes) and isinstance(body, bytes):
            pieces = stored() if pieces is None else pieces
            fields["body"] = join(body, parts, pieces)
        whole.append(fields)
    return whole
