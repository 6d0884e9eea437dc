from __future__ import annotations

import dataclasses
import sqlite3
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.support.stores import SECOND, Clock, blocked, plain_span, queued

from agentlightning import semconv
from agentlightning.errors import Conflict, InvalidInput, InvalidReward, NotFound, StoreError, Unavailable
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
from agentlightning_server.store import RolloutFilter, Store
from agentlightning_server.store.queue import LEASE_S, RETRY_CAP_S, retry_delay_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Generator[Store]:
    with Store(tmp_path / "store.db", clock=clock) as opened:
        yield opened


# --- the queue -----------------------------------------------------------------------------------


def test_32_claimers_claim_each_rollout_once(store: Store) -> None:
    ids = [f"r{i}" for i in range(400)]
    store.enqueue([queued(i) for i in ids])

    def claim_all(worker: int) -> list[str]:
        claimed: list[str] = []
        while claims := store.claim(f"w{worker}", 3):
            claimed += [claim.rollout.id for claim in claims]
        return claimed

    with ThreadPoolExecutor(32) as pool:
        claimed = [rollout_id for part in pool.map(claim_all, range(32)) for rollout_id in part]
    assert sorted(claimed) == sorted(ids)


def test_rollouts_are_claimed_in_the_order_they_were_queued(store: Store) -> None:
    store.enqueue([queued(i) for i in ("b", "a", "c")])
    assert [claim.rollout.id for claim in store.claim("w", 2)] == ["b", "a"]


def test_a_claim_carries_the_task_and_the_first_attempt(store: Store, clock: Clock) -> None:
    store.enqueue([queued("r", seconds=60.0)])
    (claim,) = store.claim("w", model="small")
    assert claim.rollout.task == queued("r").task
    assert (claim.attempt.id, claim.attempt.number, claim.model) == ("r-1", 1, "small")
    assert claim.attempt.deadline_ns == clock.now_ns + 60 * SECOND


def test_queueing_an_existing_id_leaves_it_as_it_is(store: Store) -> None:
    store.enqueue([queued("r")])
    store.claim("w")
    store.enqueue([queued("r"), queued("new")])
    assert store.rollout("r").status is RolloutStatus.RUNNING
    assert store.rollout("new").status is RolloutStatus.QUEUED


@pytest.mark.parametrize("rollout_id", ["", "a/b", "a b", "..", "é", "x" * 256])
def test_ids_that_do_not_fit_into_a_url_are_refused(store: Store, rollout_id: str) -> None:
    with pytest.raises(InvalidInput, match="rollout id"):
        store.enqueue([queued(rollout_id)])


def test_a_lease_that_runs_out_queues_the_rollout_again_and_fences_the_old_worker(
    store: Store, clock: Clock
) -> None:
    store.enqueue([queued("r")])
    store.claim("lost")
    clock.sleep(LEASE_S + 0.1)
    assert store.expire() == 1
    assert store.rollout("r").status is RolloutStatus.QUEUED
    clock.sleep(2)
    (second,) = store.claim("w2")
    assert second.attempt.number == 2
    with pytest.raises(Conflict, match="has ended as lost"):
        store.finish("r-1", "lost", AttemptStatus.SUCCEEDED, rewards=[Reward(1.0)])
    store.finish("r-2", "w2", AttemptStatus.SUCCEEDED)
    assert [a.status for a in store.attempts("r")] == [AttemptStatus.LOST, AttemptStatus.SUCCEEDED]
    assert list(store.spans("r", "r-1")) == []


def test_heartbeats_keep_the_lease_but_not_beyond_the_deadline(store: Store, clock: Clock) -> None:
    store.enqueue([queued("r", seconds=60.0, attempts=1)])
    store.claim("w")
    for _ in range(3):
        clock.sleep(LEASE_S - 1)
        if clock.now_ns < store.attempts("r")[0].deadline_ns:
            assert store.heartbeat("r-1", "w") is False
            assert store.expire() == 0
    assert store.expire() == 1
    (attempt,) = store.attempts("r")
    assert attempt.status is AttemptStatus.TIMED_OUT
    assert attempt.error is not None
    assert "60 s" in attempt.error
    assert store.rollout("r").status is RolloutStatus.FAILED


def test_failed_attempts_are_retried_after_growing_delays_until_none_is_left(
    store: Store, clock: Clock
) -> None:
    store.enqueue([queued("r", attempts=3)])
    for number in (1, 2, 3):
        (claim,) = store.claim("w")
        assert claim.attempt.number == number
        store.finish(claim.attempt.id, "w", AttemptStatus.FAILED, f"error {number}")
        assert store.claim("w") == []
        clock.sleep(retry_delay_s(number, 1.0))
    assert store.rollout("r").status is RolloutStatus.FAILED
    assert [a.error for a in store.attempts("r")] == ["error 1", "error 2", "error 3"]


def test_retry_delays_double_up_to_a_minute() -> None:
    assert [retry_delay_s(n, 0.0) for n in (1, 2, 3, 7, 100)] == [1, 2, 4, RETRY_CAP_S, RETRY_CAP_S]
    assert retry_delay_s(1, 1.0) == pytest.approx(1.2)


def test_an_attempt_given_back_is_queued_at_once_and_not_counted(store: Store) -> None:
    store.enqueue([queued("r", attempts=1)])
    for _ in range(3):
        (claim,) = store.claim("w")
        store.finish(claim.attempt.id, "w", AttemptStatus.CANCELLED, "worker stopped")
    assert store.rollout("r").status is RolloutStatus.QUEUED


def test_the_same_report_again_is_no_error_and_another_one_is(store: Store) -> None:
    store.enqueue([queued("r")])
    store.claim("w")
    for _ in range(2):
        store.finish("r-1", "w", AttemptStatus.SUCCEEDED, rewards=[Reward(1.0)])
    assert len(store.spans("r")) == 1
    with pytest.raises(Conflict):
        store.finish("r-1", "w", AttemptStatus.FAILED)
    with pytest.raises(Conflict, match="belongs to worker w"):
        store.finish("r-1", "other", AttemptStatus.SUCCEEDED)
    with pytest.raises(NotFound):
        store.finish("nope-1", "w", AttemptStatus.SUCCEEDED)


def test_cancelling_ends_the_rollout_its_attempt_and_the_attempts_key(store: Store) -> None:
    store.enqueue([queued("r"), queued("other")])
    (claim,) = store.claim("w")
    assert store.principal(claim.key) is not None
    store.cancel(["r"])
    assert store.rollout("r").status is RolloutStatus.CANCELLED
    assert store.heartbeat("r-1", "w") is True
    assert store.principal(claim.key) is None
    assert store.cached_principal(claim.key) is None
    with pytest.raises(Conflict):
        store.finish("r-1", "w", AttemptStatus.SUCCEEDED)
    assert store.rollout("other").status is RolloutStatus.QUEUED


def test_cancelling_an_unknown_rollout_cancels_none(store: Store) -> None:
    store.enqueue([queued("r")])
    with pytest.raises(NotFound, match="nope"):
        store.cancel(["r", "nope"])
    assert store.rollout("r").status is RolloutStatus.QUEUED


def test_an_error_is_kept_with_both_ends(store: Store) -> None:
    store.enqueue([queued("r")])
    store.claim("w")
    store.finish("r-1", "w", AttemptStatus.FAILED, "start" + "x" * 100_000 + "end")
    error = store.attempts("r")[0].error or ""
    assert len(error) < 40_000
    assert error.startswith("start")
    assert error.endswith("end")


# --- waiting -------------------------------------------------------------------------------------


def test_waiting_ends_when_the_last_rollout_is_final(store: Store) -> None:
    store.enqueue([queued("a"), queued("b")])
    store.claim("w", 2)
    store.finish("a-1", "w", AttemptStatus.SUCCEEDED)
    timer = threading.Timer(0.1, store.finish, ("b-1", "w", AttemptStatus.SUCCEEDED))
    timer.start()
    assert [rollout.id for rollout in store.wait(["a", "b"], 20.0)] == ["a", "b"]
    timer.join()


def test_waiting_ends_at_the_timeout_with_those_that_are_final(store: Store) -> None:
    store.enqueue([queued("a"), queued("b")])
    store.claim("w", 1)
    store.finish("a-1", "w", AttemptStatus.SUCCEEDED)
    assert [rollout.id for rollout in store.wait(["a", "b"], 0.05)] == ["a"]
    with pytest.raises(NotFound):
        store.wait(["a", "nope"], 0.05)


def test_a_rollout_that_is_queued_wakes_who_waits_for_work(store: Store) -> None:
    with store.waiting_for_work() as work:
        assert not work.done()
        store.enqueue([queued("r")])
        work.result(5.0)


# --- spans ---------------------------------------------------------------------------------------


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


# --- listing and state ---------------------------------------------------------------------------


def test_pages_follow_each_other_and_filters_restrict(store: Store) -> None:
    store.enqueue([queued(f"r{i}", run_id="a" if i % 2 else "b") for i in range(10)])
    store.claim("w")
    first = store.rollouts(RolloutFilter(limit=4))
    second = store.rollouts(RolloutFilter(limit=100, after=first[-1].id))
    assert [r.id for r in (*first, *second)] == [f"r{i}" for i in range(10)]
    assert {r.id for r in store.rollouts(RolloutFilter(run_id="a"))} == {"r1", "r3", "r5", "r7", "r9"}
    assert [r.id for r in store.rollouts(RolloutFilter(status=RolloutStatus.RUNNING))] == ["r0"]
    assert store.rollouts(RolloutFilter(mode=Mode.LIVE)) == []


def test_run_state_is_replaced_and_survives_reopening(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db") as store:
        assert store.run("run") is None
        store.set_run("run", {"step": 1})
        store.set_run("run", {"step": 2, "order": [3, 1]})
        with pytest.raises(InvalidInput, match="JSON"):
            store.set_run("run", {"step": object()})  # type: ignore[dict-item]
    with Store(tmp_path / "s.db") as store:
        assert store.run("run") == {"step": 2, "order": [3, 1]}
        assert store.runs() == ["run"]


# --- the file and the writer ---------------------------------------------------------------------


def test_a_newer_schema_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    Store(path).close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE meta SET value = '99'")
    database.close()
    with pytest.raises(StoreError, match=r"s\.db was written by a newer version.*upgrade"):
        Store(path)


@pytest.mark.parametrize("damage", ["not a database at all", "one page"])
def test_a_corrupt_file_is_refused_with_the_remedy(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.db"
    with Store(path) as store:
        store.add_spans([plain_span(i, attributes={"text": "x" * 2000}) for i in range(200)])
    content = bytearray(path.read_bytes())
    if damage == "one page":
        content[40 * 4096 : 42 * 4096] = b"\xff" * 8192
    else:
        content[:] = damage.encode() * 1000
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"s\.db cannot be used as a database.*backup"):
        Store(path)


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()
    with pytest.raises(StoreError, match="another program"):
        Store(path)


def test_a_full_queue_refuses_at_once_and_lets_others_wait(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db", max_pending=2) as store:
        with blocked(store):
            futures = [store.submit_spans([plain_span(i)]) for i in range(2)]
            with pytest.raises(Unavailable, match="send again"):
                store.submit_spans([plain_span(9)])
            patient = threading.Thread(target=store.add_spans, args=([plain_span(3)],))
            patient.start()
        patient.join(10)
        assert not patient.is_alive()
        for future in futures:
            future.result(10)
        assert store.counts() == {"succeeded": 3}


def test_what_waits_is_bounded_in_bytes_too(tmp_path: Path) -> None:
    large = [plain_span(i, attributes={"text": "x" * 60_000}) for i in range(3)]
    with Store(tmp_path / "s.db", max_pending_bytes=100_000) as store:
        with blocked(store):
            first = store.submit_spans(large[:1])
            with pytest.raises(Unavailable):
                store.submit_spans(large[1:])
        first.result(10)
        store.submit_spans(large[1:]).result(10)  # larger than the bound, but alone


def test_a_write_that_breaks_the_transaction_fails_alone(tmp_path: Path) -> None:
    with Store(tmp_path / "s.db") as store:
        with blocked(store):
            good = store.submit_spans([plain_span(1)])
            bad = store._submit(lambda connection, _: connection.exec_driver_sql("INSERT INTO no VALUES (1)"))  # pyright: ignore[reportPrivateUsage]
            also_good = store.submit_spans([plain_span(2)])
        good.result(10)
        also_good.result(10)
        with pytest.raises(StoreError, match="could not be written"):
            bad.result(10)
        assert store.counts() == {"succeeded": 2}


def test_a_full_disk_acknowledges_nothing_and_is_survived(tmp_path: Path) -> None:
    def limit(pages: int) -> None:
        sql = f"PRAGMA max_page_count = {pages}"
        store._submit(lambda connection, _: connection.exec_driver_sql(sql)).result()  # pyright: ignore[reportPrivateUsage]

    large = [plain_span(i, "r", attributes={"text": "x" * 10_000}) for i in range(100)]
    with Store(tmp_path / "s.db") as store:
        store.enqueue([queued("r")])
        store.claim("w")
        limit(30)
        with pytest.raises(StoreError, match="free disk space"):
            store.add_spans(large)
        assert list(store.spans("r")) == []
        limit(1_000_000)
        store.add_spans(large)
        assert len(store.spans("r")) == 100


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    store.close()
    with pytest.raises(Unavailable, match="closed"):
        store.submit_spans([plain_span(1)])
    assert not store.healthy
