"""What is old goes, by age and by size, and never what is queued, running or needed by an open run."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path

import pytest
from tests.support.stores import DATABASES, SECOND, Clock, new_database, plain_span, queued, store_server
from tests.support.waiting import wait_until

from agentlightning.types import AttemptStatus, Mode
from agentlightning_server import upkeep
from agentlightning_server.auth import KeyScope
from agentlightning_server.retention import Retention
from agentlightning_server.store import Store
from agentlightning_server.store.maintenance import problems, rewrite

DAY = 86_400 * SECOND
WEEK = Retention(older_than_ns=7 * DAY)


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.now_ns = time.time_ns()
    return clock


@pytest.fixture(params=DATABASES)
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Generator[Store]:
    with Store(new_database(request.param, tmp_path), clock=clock) as opened:
        yield opened


def ended(store: Store, *ids: str, run_id: str | None = None, text: int = 10) -> None:
    for number, rollout_id in enumerate(ids):
        store.enqueue([queued(rollout_id, run_id=run_id)])
        (claim,) = store.claim("w")
        span = plain_span(number, rollout_id, trace_id=f"{abs(hash(rollout_id)):032x}"[-32:])
        store.add_spans([span, plain_span(number, rollout_id, attributes={"text": rollout_id * text})])
        store.finish(claim.attempt.id, "w", AttemptStatus.SUCCEEDED)


def names(store: Store) -> set[str]:
    return {rollout.id for rollout in store.rollouts()}


def test_what_ended_long_ago_goes_with_all_that_belongs_to_it(store: Store, clock: Clock) -> None:
    ended(store, "old", text=5000)
    clock.now_ns += 8 * DAY
    ended(store, "new")
    assert store.delete_old(WEEK) == 1
    assert names(store) == {"new"}
    with store.reading() as connection:
        for table in ("spans", "chunks", "attempts", "keys"):
            sql = f"SELECT count(*) FROM {table} WHERE rollout_id = 'old'"
            assert connection.exec_driver_sql(sql).scalar_one() == 0
    assert problems(store) == []


def test_what_is_queued_or_running_stays(store: Store, clock: Clock) -> None:
    store.enqueue([queued("running", seconds=1e9), queued("queued")])
    store.claim("w")
    clock.now_ns += 100 * DAY
    assert store.delete_old(WEEK) == 0
    assert store.delete_old(Retention(larger_than_bytes=0)) == 0
    assert names(store) == {"running", "queued"}


def test_the_last_days_of_an_open_run_stay_whatever_the_size(store: Store, clock: Clock) -> None:
    ended(store, "first-step", run_id="run")
    clock.now_ns += 3 * DAY
    ended(store, "last-step", run_id="run")
    ended(store, "nobodys")
    assert store.delete_old(Retention(larger_than_bytes=0)) == 2
    assert names(store) == {"last-step"}
    clock.now_ns += 30 * DAY  # nobody went on with it
    assert store.delete_old(Retention(larger_than_bytes=0)) == 1


def test_live_rollouts_stay_until_live_learning_has_used_them(store: Store, clock: Clock) -> None:
    for number in range(3):
        store.add_spans([plain_span(number)])
    ids = [rollout.id for rollout in store.rollouts()]
    store.set_run("live", {"used": [], "after": None, "updates": 0})
    clock.now_ns += 30 * DAY
    assert store.delete_old(WEEK) == 0
    store.set_run("live", {"used": [], "after": ids[1], "updates": 1})
    assert store.delete_old(WEEK) == 1
    assert [rollout.id for rollout in store.rollouts()] == ids[1:]
    assert all(rollout.mode is Mode.LIVE for rollout in store.rollouts())


def test_the_oldest_go_until_the_rest_fits(store: Store) -> None:
    ids = [f"r{i:03}" for i in range(40)]
    ended(store, *ids, text=2000)
    used = store.used_bytes()
    assert store.delete_old(Retention(larger_than_bytes=used * 10)) == 0
    deleted = store.delete_old(Retention(larger_than_bytes=used // 2))
    assert 10 <= deleted <= 30
    assert names(store) == set(ids[deleted:])


def test_spans_that_come_too_late_for_a_deleted_rollout_open_it_anew(store: Store, clock: Clock) -> None:
    ended(store, "gone", text=5000)
    clock.now_ns += 8 * DAY
    store.delete_old(WEEK)
    store.add_spans([plain_span(900, "gone", attributes={"text": "gone" * 5000})])
    assert store.spans("gone")[0].attributes == {"text": "gone" * 5000}
    assert problems(store) == []


def test_all_projects_are_looked_after_and_expired_keys_go(store: Store, clock: Clock) -> None:
    ended(store.of("other"), "theirs")
    store.mint_key(KeyScope.RUNNER, "short", clock.now_ns + DAY)
    clock.now_ns += 8 * DAY
    assert store.delete_old(WEEK) == 1
    assert store.keys() == []


def test_room_is_given_back_to_the_disk(store: Store, clock: Clock) -> None:
    ended(store, *(f"r{i}" for i in range(30)), text=20_000)
    clock.now_ns += 8 * DAY
    store.delete_old(WEEK)
    before, after = rewrite(store)
    assert after < before
    ended(store, "next")  # it goes on working
    assert names(store) == {"next"}


def test_a_server_deletes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "DELETE_EVERY_S", 0.05)
    with store_server(tmp_path, retain_days=0.0) as server:
        ended(server.store, "brief")
        wait_until(lambda: names(server.store) == set())
