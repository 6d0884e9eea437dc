from __future__ import annotations

import sqlite3
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.scale import scaled
from tests.support.stores import DATABASES, SECOND, Clock, blocked, new_database, plain_span, queued

from agentlightning.errors import Conflict, InvalidInput, NotFound, StoreError, Unavailable
from agentlightning.types import (
    AttemptStatus,
    Mode,
    Reward,
    RolloutStatus,
)
from agentlightning_server.store import RolloutFilter, Store
from agentlightning_server.store.queue import LEASE_S, RETRY_CAP_S, retry_delay_s


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


# --- the queue -----------------------------------------------------------------------------------


def test_32_claimers_claim_each_rollout_once(store: Store) -> None:
    ids = [f"r{i}" for i in range(scaled(400, 10_000))]
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


def test_run_state_is_replaced_and_survives_reopening(database: Path | str) -> None:
    with Store(database) as store:
        assert store.run("run") is None
        store.set_run("run", {"step": 1})
        store.set_run("run", {"step": 2, "order": [3, 1]})
        with pytest.raises(InvalidInput, match="JSON"):
            store.set_run("run", {"step": object()})  # type: ignore[dict-item]
    with Store(database) as store:
        assert store.run("run") == {"step": 2, "order": [3, 1]}
        assert store.runs() == ["run"]


# --- the file and the writer ---------------------------------------------------------------------


def test_a_newer_schema_is_refused_with_the_remedy(database: Path | str) -> None:
    with Store(database) as store:
        sql = "UPDATE alembic_version SET version_num = '9999'"
        store._submit(lambda write: write.connection.exec_driver_sql(sql)).result()  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(StoreError, match=r"was written by a newer version.*upgrade"):
        Store(database)


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


def test_a_full_queue_refuses_at_once_and_lets_others_wait(database: Path | str) -> None:
    with Store(database, max_pending=2) as store:
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


def test_what_waits_is_bounded_in_bytes_too(database: Path | str) -> None:
    large = [plain_span(i, attributes={"text": "x" * 60_000}) for i in range(3)]
    with Store(database, max_pending_bytes=100_000) as store:
        with blocked(store):
            first = store.submit_spans(large[:1])
            with pytest.raises(Unavailable):
                store.submit_spans(large[1:])
        first.result(10)
        store.submit_spans(large[1:]).result(10)  # larger than the bound, but alone


def test_a_write_that_breaks_the_transaction_fails_alone(database: Path | str) -> None:
    with Store(database) as store:
        with blocked(store):
            good = store.submit_spans([plain_span(1)])
            bad = store._submit(lambda write: write.connection.exec_driver_sql("INSERT INTO no VALUES (1)"))  # pyright: ignore[reportPrivateUsage]
            also_good = store.submit_spans([plain_span(2)])
        good.result(10)
        also_good.result(10)
        with pytest.raises(StoreError, match="could not be written"):
            bad.result(10)
        assert store.counts() == {"succeeded": 2}


def test_a_full_disk_acknowledges_nothing_and_is_survived(tmp_path: Path) -> None:
    def limit(pages: int) -> None:
        sql = f"PRAGMA max_page_count = {pages}"
        store._submit(lambda write: write.connection.exec_driver_sql(sql)).result()  # pyright: ignore[reportPrivateUsage]

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


def test_a_closed_store_says_so(database: Path | str) -> None:
    store = Store(database)
    store.close()
    with pytest.raises(Unavailable, match="closed"):
        store.submit_spans([plain_span(1)])
    assert not store.healthy
