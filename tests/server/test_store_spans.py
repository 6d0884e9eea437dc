from __future__ import annotations

import dataclasses
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.support.stores import DATABASES, Clock, new_database, plain_span, queued

from agentlightning import semconv
from agentlightning.errors import InvalidReward, NotFound
from agentlightning.types import (
    AttemptStatus,
    Mode,
    Reward,
    RolloutStatus,
    Span,
    SpanEvent,
    SpanKind,
    SpanLink,
    SpanStatus,
    live_attempt_id,
    live_rollout_id,
)
from agentlightning_server.otlp_pb import row_from_span, span_from_row
from agentlightning_server.store import Store


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    return new_database(request.param, tmp_path)


@pytest.fixture
def store(database: Path | str, clock: Clock) -> Generator[Store]:
    with Store(database, clock=clock) as opened:
        yield opened


def test_a_span_comes_back_as_it_was_written(store: Store) -> None:
    store.enqueue([queued("r")])
    written = Span(
        trace_id="a" * 32,
        span_id="b" * 16,
        parent_id="c" * 16,
        name="chat policy",
        kind=SpanKind.CLIENT,
        start_ns=1,
        end_ns=2,
        status=SpanStatus.ERROR,
        status_message="it broke",
        attributes={
            "text": "é",
            "ids": bytes(range(256)),
            "n": -3,
            "f": 0.5,
            "b": True,
            "l": [1, {"x": None}],
        },
        events=(SpanEvent("exception", 5, {"exception.type": "ValueError"}),),
        links=(SpanLink("d" * 32, "e" * 16, {"why": "around"}),),
        resource={"service.name": "app"},
        scope="adapter",
        rollout_id="r",
        attempt_id="r-1",
    )
    store.add_spans([written])
    store.claim("w")
    assert list(store.spans("r")) == [written]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.binary()
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3).filter(str.isascii), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5).filter(str.isascii), values, max_size=4))
@hypothesis_settings(max_examples=200, deadline=None)
def test_any_attribute_survives_the_stored_form(attributes: dict[str, object]) -> None:
    span = plain_span(1, "r", attempt_id="r-1", attributes=attributes)
    row = row_from_span(span)
    assert span_from_row(dict(row)) == span


def test_text_that_is_not_unicode_and_huge_numbers_are_kept_as_text() -> None:
    span = plain_span(1, "r", attributes={"half": "\ud800", "big": 2**70, "odd": {1, 2}}, name="\udfff")
    attributes = span_from_row(dict(row_from_span(span))).attributes
    assert attributes == {"half": "\\ud800", "big": str(2**70), "odd": "{1, 2}"}


def test_the_same_spans_from_8_threads_are_stored_once(store: Store) -> None:
    store.enqueue([queued("r")])
    store.claim("w")
    spans = [plain_span(i, "r") for i in range(50)]
    with ThreadPoolExecutor(8) as pool:
        for stored in [pool.submit(store.add_spans, spans) for _ in range(24)]:
            stored.result()
    assert list(store.spans("r")) == [dataclasses.replace(s, attempt_id="r-1") for s in spans]


def test_spans_are_those_of_the_attempt_that_decides(store: Store, clock: Clock) -> None:
    store.enqueue([queued("r")])
    for number, status in ((1, AttemptStatus.FAILED), (2, AttemptStatus.SUCCEEDED)):
        store.claim("w")
        store.add_spans([plain_span(number, "r")])
        assert [s.span_id for s in store.spans("r")] == [f"{number + 1:016x}"]
        store.finish(f"r-{number}", "w", status)
        clock.sleep(5)
    assert [s.attempt_id for s in store.spans("r")] == ["r-2"]
    assert [s.attempt_id for s in store.spans("r", "r-1")] == ["r-1"]


def test_a_trace_without_a_rollout_opens_a_live_one_that_its_root_ends(store: Store) -> None:
    trace = "f" * 32
    child = plain_span(1, trace_id=trace, parent_id="1" * 16)
    store.add_spans([child])
    live = store.rollout(live_rollout_id(trace))
    assert (live.mode, live.status) == (Mode.LIVE, RolloutStatus.RUNNING)
    store.add_spans([plain_span(2, trace_id=trace)])
    assert store.rollout(live.id).status is RolloutStatus.SUCCEEDED
    (attempt,) = store.attempts(live.id)
    assert (attempt.id, attempt.status) == (live_attempt_id(trace), AttemptStatus.SUCCEEDED)
    store.add_spans([plain_span(3, trace_id=trace, parent_id="1" * 16)])
    assert len(store.spans(live.id)) == 3


def test_a_live_root_with_an_error_fails_and_a_reward_ends_nothing(store: Store) -> None:
    failed, rewarded = "e" * 32, "d" * 32
    store.add_spans([plain_span(1, trace_id=failed, status=SpanStatus.ERROR)])
    store.add_spans([plain_span(2, trace_id=rewarded, scope=semconv.SCOPE_REWARD)])
    assert store.rollout(live_rollout_id(failed)).status is RolloutStatus.FAILED
    assert store.rollout(live_rollout_id(rewarded)).status is RolloutStatus.RUNNING


def test_many_live_traces_in_one_batch(store: Store) -> None:
    store.add_spans([plain_span(i) for i in range(1200)])
    assert store.counts() == {"succeeded": 1200}


def test_a_span_of_a_rollout_that_nobody_queued_opens_it_under_its_name(store: Store) -> None:
    store.add_spans([plain_span(1, "mine", attempt_id="mine-try")])
    assert store.rollout("mine").mode is Mode.LIVE
    assert [a.id for a in store.attempts("mine")] == ["mine-try"]
    store.add_spans([plain_span(2, "mine")])
    assert len(store.spans("mine")) == 2


def test_roots_do_not_end_rollouts_that_a_worker_runs(store: Store) -> None:
    store.enqueue([queued("r")])
    store.claim("w")
    store.add_spans([plain_span(1, "r")])
    assert store.rollout("r").status is RolloutStatus.RUNNING


def test_a_reward_is_a_span_and_the_same_one_twice_counts_once(store: Store) -> None:
    store.enqueue([queued("r")])
    store.claim("w")
    reward = Reward(0.5, "style", "a" * 16, time_ns=77)
    assert [store.add_reward("r", reward) for _ in range(2)] == ["r-1", "r-1"]
    (span,) = store.spans("r")
    assert span.scope == semconv.SCOPE_REWARD
    assert span.attributes == {
        semconv.REWARD_VALUE: 0.5,
        semconv.REWARD_NAME: "style",
        semconv.REWARD_TARGET: "a" * 16,
    }


def test_a_reward_of_a_live_rollout_joins_its_trace(store: Store) -> None:
    span = plain_span(1)
    store.add_spans([span])
    store.add_reward(live_rollout_id(span.trace_id), Reward(1.0))
    assert {s.trace_id for s in store.spans(live_rollout_id(span.trace_id))} == {span.trace_id}


def test_rewards_that_are_not_finite_or_have_no_home_are_refused(store: Store) -> None:
    store.enqueue([queued("r")])
    store.claim("w")
    with pytest.raises(InvalidReward):
        store.add_reward("r", Reward(float("nan")))
    with pytest.raises(InvalidReward):
        store.finish("r-1", "w", AttemptStatus.SUCCEEDED, rewards=[Reward(float("inf"))])
    with pytest.raises(NotFound):
        store.add_reward("nope", Reward(1.0))
    with pytest.raises(NotFound):
        store.add_reward("r", Reward(1.0), "r-9")
    assert store.rollout("r").status is RolloutStatus.RUNNING
