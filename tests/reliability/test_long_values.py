"""An episode of n turns takes O(n) space, and every span comes back as it was sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1 import trace_pb2 as pb
from tests.support.stores import DATABASES, new_database, plain_span, queued

from agentlightning import semconv
from agentlightning.errors import StoreError
from agentlightning.types import Span
from agentlightning_server.store import Store
from agentlightning_server.store.longvalues import CHUNK_BYTES, cut, join

long_texts = st.tuples(st.text(max_size=40), st.integers(0, 9000)).map(lambda p: (p[0] or "é") * p[1])
long_bytes = st.tuples(st.binary(min_size=1, max_size=9), st.integers(0, 3000)).map(lambda p: p[0] * p[1])


@given(st.lists(long_texts | long_bytes | st.integers(0, 9), max_size=5))
@hypothesis_settings(max_examples=60, deadline=None)
def test_what_is_cut_is_joined_to_the_same_bytes(values: list[Any]) -> None:
    span = pb.Span(name="s", trace_id=b"t" * 16, span_id=b"s" * 8)
    for number, value in enumerate(values):
        pair = span.attributes.add(key=str(number)).value
        if isinstance(value, str):
            pair.string_value = value
        elif isinstance(value, bytes):
            pair.bytes_value = value
        else:
            pair.int_value = value
    body = span.SerializeToString()
    short, parts, chunks = cut(body)
    stored = {chunk.hash: (chunk.parent, chunk.data) for chunk in chunks}
    assert (short if parts is None else join(short, parts, stored)) == body
    assert len(short) < 2 * CHUNK_BYTES * (1 + len(values))


def conversation(turns: int, rollout_id: str) -> list[Span]:
    """Calls as the gateway writes them: each prompt, as messages and ids, repeats the one before."""
    messages: list[dict[str, str]] = []
    ids: list[int] = []
    spans: list[Span] = []
    rng = np.random.default_rng(turns)
    for turn in range(turns):
        messages.append({"role": "user", "content": f"turn {turn}: " + rng.bytes(300).hex()})
        ids += rng.integers(0, 2**31, 150).tolist()
        attributes: dict[str, Any] = {
            semconv.INPUT_MESSAGES: json.dumps(messages),
            semconv.PROMPT_IDS: np.array(ids, "<i4").tobytes(),
            semconv.TOOL_DEFINITIONS: json.dumps([{"name": "tool", "description": "d" * 3000}]),
        }
        spans.append(plain_span(turn, rollout_id, attempt_id=f"{rollout_id}-1", attributes=attributes))
    return spans


def size_of(store: Store) -> int:
    with store.reading() as connection:
        sizes = "SELECT coalesce(sum(length(body) + coalesce(length(parts), 0)), 0) FROM spans"
        pieces = "SELECT coalesce(sum(length(data)), 0) FROM chunks"
        return sum(int(connection.exec_driver_sql(sql).scalar_one()) for sql in (sizes, pieces))


@pytest.mark.parametrize("kind", DATABASES)
def test_space_grows_with_the_turns_and_not_with_their_square(tmp_path: Path, kind: str) -> None:
    sizes: dict[int, int] = {}
    for turns in (20, 40):
        with Store(new_database(kind, tmp_path / str(turns))) as store:
            store.enqueue([queued("r")])
            store.claim("w")
            written = conversation(turns, "r")
            for span in written:
                store.add_spans([span])
            assert list(store.spans("r")) == written
            sizes[turns] = size_of(store)
    assert sizes[40] < 2.3 * sizes[20]
    plain = sum(len(str(span.attributes[semconv.INPUT_MESSAGES])) for span in conversation(40, "r"))
    assert sizes[40] < plain / 2


def test_a_piece_is_stored_once_however_it_is_sent(tmp_path: Path) -> None:
    (span,) = conversation(1, "r")
    with Store(tmp_path / "s.db") as store:
        store.add_spans([span, plain_span(5, "r", attributes=dict(span.attributes))])
        store.add_spans([plain_span(6, "r", attributes=dict(span.attributes))])
        once = _count(store)
    with Store(tmp_path / "s.db") as store:  # a restart has forgotten which are there
        store.add_spans([plain_span(7, "r", attributes=dict(span.attributes))])
        assert _count(store) == once
        assert len({json.dumps(str(s.attributes)) for s in store.spans("r")}) == 1


def test_a_lost_piece_is_an_error_that_says_so(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db") as store:
        store.add_spans(conversation(1, "r"))
        delete = "DELETE FROM chunks WHERE hash IN (SELECT hash FROM chunks LIMIT 1)"
        store._submit(lambda write: write.connection.exec_driver_sql(delete)).result()  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(StoreError, match="agl store check"):
            store.spans("r")


def _count(store: Store) -> int:
    with store.reading() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM chunks").scalar_one())
