"""`Store`: rollouts, attempts, spans, keys and run states in one SQLite file, for every thread of a server.

Each write exists twice: `submit_x` returns a future that completes after the commit, for coroutines; `x`
waits for it, for threads. Reads use connections of their own and see every completed write.
Not here: SQL (`queue`, `spans`, `keys`, `reads`) and HTTP (`routes`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError

from agentlightning.errors import InvalidReward, NotFound, StoreError
from agentlightning.types import (
    Attempt,
    AttemptStatus,
    Claim,
    Json,
    JsonObject,
    Reward,
    Rollout,
    Span,
)
from agentlightning.wire import FLOAT32_MAX

from ..otlp_pb import SpanRow, row_from_span, row_size
from ..settings import Durability
from . import queue, reads, rows
from .keys import Principal, Scope, hash_key, read_key, write_key
from .reads import RolloutFilter
from .schema import open_engines, runs
from .spans import attempt_id_of, reward_span, write_spans
from .waiting import FinalRollouts, Signal
from .writer import Changes, Writer

T = TypeVar("T")

MAX_PENDING = 4096  # writes
MAX_PENDING_BYTES = 64 * 1024 * 1024
_KNOWN_ROLLOUTS = 200_000  # ids kept so that spans need not look their rollout up: about 30 MB
_CACHED_KEYS = 20_000


class Store:
    """The store. Thread-safe. Close it, or use it as a context manager.

    Opening raises StoreError for a database that is corrupt or of a newer schema.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        durability: Durability = "full",
        max_pending: int = MAX_PENDING,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.path = Path(path)
        self._clock = clock
        self._write_engine, self._read_engine = open_engines(self.path, durability)
        self._final = FinalRollouts()
        self._work = Signal()
        self._known: dict[str, None] = {}
        self._principals: dict[str, Principal] = {}
        self._key_generation = 0
        self._writer = Writer(
            self._write_engine,
            self._committed,
            max_pending=max_pending,
            max_pending_bytes=max_pending_bytes,
        )

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits and close the file."""
        self._writer.close()
        self._write_engine.dispose()
        self._read_engine.dispose()

    @property
    def healthy(self) -> bool:
        """Whether it can still write and read."""
        if not self._writer.alive:
            return False
        try:
            self._read(lambda connection: connection.exec_driver_sql("SELECT 1"))
        except StoreError:
            return False
        return True

    @property
    def pending(self) -> int:
        """Writes that wait for the writer."""
        return self._writer.pending

    # --- spans and rewards -----------------------------------------------------------------------

    def submit_rows(self, span_rows: Sequence[SpanRow]) -> Future[None]:
        """Store rows as ingest decodes them. Raises Unavailable when too much is waiting."""
        return self._submit_rows(span_rows, wait_for_room=False)

    def submit_spans(self, spans: Sequence[Span]) -> Future[None]:
        """Store spans; those whose (trace id, span id) exists are left as they are.

        Raises InvalidSpans, and Unavailable when too much is waiting.
        """
        return self.submit_rows([row_from_span(span) for span in spans])

    def add_spans(self, spans: Sequence[Span]) -> None:
        """`submit_spans`, committed when it returns; waits where that would be refused for lack of room."""
        self._submit_rows([row_from_span(span) for span in spans], wait_for_room=True).result()

    def submit_reward(self, rollout_id: str, reward: Reward, attempt_id: str | None = None) -> Future[str]:
        """Give an attempt (by default the one under way, or the last) a reward; completes with its id.

        The same reward with the same `time_ns` again changes nothing. Raises InvalidReward, NotFound.
        """
        checked = self._stamp(reward)

        def run(connection: sa.Connection, changes: Changes) -> str:
            known = reads.list_attempts(connection, rollout_id)
            chosen = attempt_id or (reads.deciding(known).id if known else attempt_id_of(rollout_id, 1))
            if attempt_id is not None and attempt_id not in {one.id for one in known}:
                raise NotFound(f"rollout {rollout_id} has no attempt {attempt_id!r:.300}")
            row = reward_span(rollout_id, chosen, checked)
            write_spans(connection, changes, [row], self._is_known, self._clock())
            return chosen

        return self._submit(run)

    def add_reward(self, rollout_id: str, reward: Reward, attempt_id: str | None = None) -> str:
        """`submit_reward`, committed when it returns."""
        return self.submit_reward(rollout_id, reward, attempt_id).result()

    def spans(self, rollout_id: str, attempt_id: str | None = None) -> Sequence[Span]:
        """Spans of an attempt by start time; by default of the one that succeeded, else the latest."""
        return self._read(lambda connection: reads.list_spans(connection, rollout_id, attempt_id))

    # --- the queue -------------------------------------------------------------------------------

    def submit_enqueue(self, rollouts: Sequence[Rollout], *, wait_for_room: bool = False) -> Future[None]:
        """Queue rollouts; those whose id exists are left as they are. Raises InvalidInput."""
        new = queue.rollout_rows(rollouts, self._clock())
        size = sum(len(row["task"] or b"") for row in new)
        return self._writer.submit(
            lambda connection, changes: queue.enqueue(connection, changes, new),
            size=size,
            wait_for_room=wait_for_room,
        )

    def enqueue(self, rollouts: Sequence[Rollout]) -> None:
        """`submit_enqueue`, committed when it returns."""
        self.submit_enqueue(rollouts, wait_for_room=True).result()

    def submit_claim(self, worker_id: str, limit: int = 1, model: str = "policy") -> Future[list[Claim]]:
        """Lease up to `limit` rollouts for 30 s each, renewed by `heartbeat`."""
        return self._submit(
            lambda connection, changes: queue.claim(
                connection, changes, worker_id, limit, model, self._clock()
            )
        )

    def claim(self, worker_id: str, limit: int = 1, model: str = "policy") -> list[Claim]:
        """`submit_claim`, committed when it returns."""
        return self.submit_claim(worker_id, limit, model).result()

    def submit_heartbeat(self, attempt_id: str, worker_id: str) -> Future[bool]:
        """Renew a lease; True when the attempt was cancelled. Fails with NotFound or Conflict."""
        return self._submit(
            lambda connection, changes: queue.heartbeat(
                connection, changes, attempt_id, worker_id, self._clock()
            )
        )

    def heartbeat(self, attempt_id: str, worker_id: str) -> bool:
        """`submit_heartbeat`, committed when it returns."""
        return self.submit_heartbeat(attempt_id, worker_id).result()

    def submit_finish(
        self,
        attempt_id: str,
        worker_id: str,
        status: AttemptStatus,
        error: str | None = None,
        rewards: Sequence[Reward] = (),
    ) -> Future[None]:
        """End an attempt with its rewards. Raises InvalidReward; fails with NotFound or Conflict."""
        checked = [self._stamp(reward) for reward in rewards]
        return self._submit(
            lambda connection, changes: queue.finish(
                connection, changes, attempt_id, worker_id, status, error, checked, self._clock()
            )
        )

    def finish(
        self,
        attempt_id: str,
        worker_id: str,
        status: AttemptStatus,
        error: str | None = None,
        rewards: Sequence[Reward] = (),
    ) -> None:
        """`submit_finish`, committed when it returns."""
        self.submit_finish(attempt_id, worker_id, status, error, rewards).result()

    def submit_expire(self) -> Future[int]:
        """End attempts whose lease or deadline ran out; completes with how many."""
        return self._submit(lambda connection, changes: queue.expire(connection, changes, self._clock()))

    def expire(self) -> int:
        """`submit_expire`, committed when it returns."""
        return self.submit_expire().result()

    def submit_cancel(self, rollout_ids: Sequence[str]) -> Future[None]:
        """End rollouts and their running attempts. Fails with NotFound, then all stay as they are."""
        ids = list(rollout_ids)
        return self._submit(lambda connection, changes: queue.cancel(connection, changes, ids, self._clock()))

    def cancel(self, rollout_ids: Sequence[str]) -> None:
        """`submit_cancel`, committed when it returns."""
        self.submit_cancel(rollout_ids).result()

    # --- reading and waiting ---------------------------------------------------------------------

    def rollout(self, rollout_id: str) -> Rollout:
        """One rollout. Raises NotFound."""
        return self._read(lambda connection: reads.rollout(connection, rollout_id))

    def rollouts(self, wanted: RolloutFilter | None = None) -> Sequence[Rollout]:
        """A page of rollouts, oldest first."""
        return self._read(lambda connection: reads.list_rollouts(connection, wanted or RolloutFilter()))

    def attempts(self, rollout_id: str) -> Sequence[Attempt]:
        """The attempts of a rollout, first to last. Raises NotFound."""
        return self._read(lambda connection: reads.list_attempts(connection, rollout_id))

    def attempt(self, attempt_id: str) -> Attempt:
        """One attempt. Raises NotFound."""
        return self._read(lambda connection: reads.attempt(connection, attempt_id))

    def final(self, rollout_ids: Sequence[str]) -> Sequence[Rollout]:
        """Those of the rollouts that are final now. Raises NotFound."""
        return self._read(lambda connection: reads.final_rollouts(connection, rollout_ids))

    def counts(self) -> Mapping[str, int]:
        """Number of rollouts by status."""
        return self._read(reads.counts)

    def wait(self, rollout_ids: Sequence[str], timeout_s: float | None = None) -> Sequence[Rollout]:
        """Those of the rollouts that are final, as soon as all are, or at the timeout. Raises NotFound."""
        with self.waiting_for_final(rollout_ids) as done, suppress(TimeoutError):
            done.result(timeout_s)
        return self.final(rollout_ids)

    @contextmanager
    def waiting_for_final(self, rollout_ids: Sequence[str]) -> Generator[Future[None]]:
        """A future that completes when all of the rollouts are final. Raises NotFound."""
        with self._final.subscribe(rollout_ids) as waiter:
            self._final.remove(waiter, [rollout.id for rollout in self.final(rollout_ids)])
            yield waiter.future

    @contextmanager
    def waiting_for_work(self) -> Generator[Future[None]]:
        """A future that completes when rollouts are queued; enter before claiming, so that none is missed."""
        with self._work.subscribe() as future:
            yield future

    @property
    def waiting_for_work_count(self) -> int:
        """Number of workers that wait for work."""
        return self._work.waiting

    def seconds_to_retry(self) -> float | None:
        """Seconds until a queued rollout becomes claimable; None when none is queued."""
        ready_ns = self._read(queue.next_ready_ns)
        return None if ready_ns is None else max(0.0, (ready_ns - self._clock()) / 1e9)

    # --- keys ------------------------------------------------------------------------------------

    def mint_key(self, principal: Principal) -> str:
        """Make a key; this is the only time it can be seen."""
        now_ns = self._clock()
        return self._submit(
            lambda connection, changes: write_key(connection, changes, principal, now_ns)
        ).result()

    def cached_principal(self, key: str) -> Principal | None:
        """Whom the key belongs to, if that was asked before; never blocks."""
        return self._principals.get(hash_key(key))

    def principal(self, key: str) -> Principal | None:
        """Whom the key belongs to; None for an unknown key or that of an attempt which has ended."""
        key_hash = hash_key(key)
        generation = self._key_generation
        found = self._principals.get(key_hash) or self._read(
            lambda connection: read_key(connection, key_hash)
        )
        # An attempt that ended while the row was read must not come back to life in the cache.
        if found is not None and generation == self._key_generation and len(self._principals) < _CACHED_KEYS:
            self._principals[key_hash] = found
        return found

    # --- training runs ---------------------------------------------------------------------------

    def set_run(self, run_id: str, state: JsonObject) -> None:
        """Store what a training run needs to go on, in place of what was there."""
        blob = rows.to_json(cast(Json, state), f"the state of run {run_id!r}")
        now_ns = self._clock()
        values = {"id": run_id, "state": blob, "created_ns": now_ns, "updated_ns": now_ns}
        statement = insert(runs).on_conflict_do_update(
            index_elements=["id"], set_={"state": blob, "updated_ns": now_ns}
        )
        self._submit(lambda connection, _: _void(connection.execute(statement, values))).result()

    def run(self, run_id: str) -> dict[str, Any] | None:
        """What `set_run` stored; None when there is no such run."""
        return self._read(lambda connection: reads.run_state(connection, run_id))

    def runs(self) -> Sequence[str]:
        """Ids of the training runs, oldest first."""
        return self._read(reads.run_ids)

    # --- plumbing --------------------------------------------------------------------------------

    def _submit(self, run: Callable[[sa.Connection, Changes], T]) -> Future[T]:
        return self._writer.submit(run, size=200)

    def _submit_rows(self, span_rows: Sequence[SpanRow], *, wait_for_room: bool) -> Future[None]:
        return self._writer.submit(
            lambda connection, changes: write_spans(
                connection, changes, span_rows, self._is_known, self._clock()
            ),
            size=sum(map(row_size, span_rows)),
            wait_for_room=wait_for_room,
        )

    def _read(self, read: Callable[[sa.Connection], T]) -> T:
        try:
            with self._read_engine.connect() as connection:
                return read(connection)
        except DBAPIError as error:
            raise StoreError(
                f"{self.path} could not be read ({error.orig}): check the disk and the file"
            ) from error

    def _stamp(self, reward: Reward) -> Reward:
        if not abs(reward.value) <= FLOAT32_MAX:
            raise InvalidReward(
                f"reward {reward.name!r} is {reward.value}: give a number finite as a float32"
            )
        if reward.time_ns:
            return reward
        return Reward(float(reward.value), reward.name, reward.target, self._clock())

    def _is_known(self, rollout_id: str) -> bool:
        return rollout_id in self._known

    def _committed(self, changes: Changes) -> None:
        """Runs in the writer's thread after each commit."""
        if changes.known_rollouts:
            if len(self._known) > _KNOWN_ROLLOUTS:
                self._known.clear()
            self._known.update(dict.fromkeys(changes.known_rollouts))
        if changes.ended_attempts:
            self._forget_keys(changes.ended_attempts)
        if changes.final_rollouts:
            self._final.announce(changes.final_rollouts)
        if changes.work:
            self._work.announce()

    def _forget_keys(self, ended: set[str]) -> None:
        self._key_generation += 1
        stale = [h for h, owner in list(self._principals.items()) if owner.attempt_id in ended]
        for key_hash in stale:
            self._principals.pop(key_hash, None)


def _void(_result: object) -> None:
    return None


__all__ = ["Principal", "RolloutFilter", "Scope", "Store"]
