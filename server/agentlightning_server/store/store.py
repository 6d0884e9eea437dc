"""`Store`: rollouts, attempts, spans, keys and run states of one project, for every thread of a server.

Each write exists twice: `submit_x` returns a future that completes after the commit, for coroutines; `x`
waits for it, for threads. Reads use connections of their own and see every completed write. `of` gives the
same database for another project.
Not here: SQL (`queue`, `spans`, `keys`, `reads`, `retention`), threads and caches (`core`), HTTP (`routes`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, cast

import sqlalchemy as sa

from agentlightning.errors import InvalidReward, NotFound
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
from ..retention import Retention
from . import keys, queue, reads, retention, rows
from .core import StoreCore
from .keys import KeyInfo, Principal, Scope, hash_key
from .reads import RolloutFilter
from .schema import runs
from .spans import attempt_id_of, reward_span, write_spans
from .sql import InsertNew, Write

_insert_run = InsertNew(runs)
_update_run = (
    runs.update()
    .where(runs.c.project == sa.bindparam("the_project"), runs.c.id == sa.bindparam("the_id"))
    .values(state=sa.bindparam("the_state"), updated_ns=sa.bindparam("now_ns"))
)


class Store(StoreCore):
    """The store. Thread-safe. Close it, or use it as a context manager.

    Opening raises StoreError for a database that is corrupt, of a newer schema or out of reach.
    """

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

        def run(write: Write) -> str:
            known = reads.list_attempts(write, rollout_id)
            chosen = attempt_id or (reads.deciding(known).id if known else attempt_id_of(rollout_id, 1))
            if attempt_id is not None and attempt_id not in {one.id for one in known}:
                raise NotFound(f"rollout {rollout_id} has no attempt {attempt_id!r:.300}")
            row = reward_span(rollout_id, chosen, checked)
            write_spans(write, [row], self._known)
            return chosen

        return self._submit(run)

    def add_reward(self, rollout_id: str, reward: Reward, attempt_id: str | None = None) -> str:
        """`submit_reward`, committed when it returns."""
        return self.submit_reward(rollout_id, reward, attempt_id).result()

    def spans(self, rollout_id: str, attempt_id: str | None = None) -> Sequence[Span]:
        """Spans of an attempt by start time; by default of the one that succeeded, else the latest."""
        return self._read(lambda read: reads.list_spans(read, rollout_id, attempt_id))

    # --- the queue -------------------------------------------------------------------------------

    def submit_enqueue(self, rollouts: Sequence[Rollout], *, wait_for_room: bool = False) -> Future[None]:
        """Queue rollouts; those whose id exists are left as they are. Raises InvalidInput."""
        new = queue.rollout_rows(rollouts, self._clock())
        size = sum(len(row["task"] or b"") for row in new)
        return self._submit(
            lambda write: queue.enqueue(write, new), size=size, wait_for_room=wait_for_room, refuses=False
        )

    def enqueue(self, rollouts: Sequence[Rollout]) -> None:
        """`submit_enqueue`, committed when it returns."""
        self.submit_enqueue(rollouts, wait_for_room=True).result()

    def submit_claim(self, worker_id: str, limit: int = 1, model: str = "policy") -> Future[list[Claim]]:
        """Lease up to `limit` rollouts for 30 s each, renewed by `heartbeat`."""
        return self._submit(lambda write: queue.claim(write, worker_id, limit, model), refuses=False)

    def claim(self, worker_id: str, limit: int = 1, model: str = "policy") -> list[Claim]:
        """`submit_claim`, committed when it returns."""
        return self.submit_claim(worker_id, limit, model).result()

    def submit_heartbeat(self, attempt_id: str, worker_id: str) -> Future[bool]:
        """Renew a lease; True when the attempt was cancelled. Fails with NotFound or Conflict."""
        return self._submit(lambda write: queue.heartbeat(write, attempt_id, worker_id))

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
        return self._submit(lambda write: queue.finish(write, attempt_id, worker_id, status, error, checked))

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
        """End attempts, of all projects, whose lease or deadline ran out; completes with how many."""
        return self._submit(queue.expire, refuses=False)

    def expire(self) -> int:
        """`submit_expire`, committed when it returns."""
        return self.submit_expire().result()

    def submit_cancel(self, rollout_ids: Sequence[str]) -> Future[None]:
        """End rollouts and their running attempts. Fails with NotFound, then all stay as they are."""
        ids = list(rollout_ids)
        return self._submit(lambda write: queue.cancel(write, ids))

    def cancel(self, rollout_ids: Sequence[str]) -> None:
        """`submit_cancel`, committed when it returns."""
        self.submit_cancel(rollout_ids).result()

    # --- reading and waiting ---------------------------------------------------------------------

    def rollout(self, rollout_id: str) -> Rollout:
        """One rollout. Raises NotFound."""
        return self._read(lambda read: reads.rollout(read, rollout_id))

    def rollouts(self, wanted: RolloutFilter | None = None) -> Sequence[Rollout]:
        """A page of rollouts, oldest first."""
        return self._read(lambda read: reads.list_rollouts(read, wanted or RolloutFilter()))

    def attempts(self, rollout_id: str) -> Sequence[Attempt]:
        """The attempts of a rollout, first to last. Raises NotFound."""
        return self._read(lambda read: reads.list_attempts(read, rollout_id))

    def attempt(self, attempt_id: str) -> Attempt:
        """One attempt. Raises NotFound."""
        return self._read(lambda read: reads.attempt(read, attempt_id))

    def final(self, rollout_ids: Sequence[str]) -> Sequence[Rollout]:
        """Those of the rollouts that are final now. Raises NotFound."""
        return self._read(lambda read: reads.final_rollouts(read, rollout_ids))

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
        ids = [(self.project, rollout_id) for rollout_id in rollout_ids]
        with self._final.subscribe(ids) as waiter:
            found = self.final(rollout_ids)
            self._final.remove(waiter, [(self.project, rollout.id) for rollout in found])
            yield waiter.future

    @contextmanager
    def waiting_for_work(self) -> Generator[Future[None]]:
        """A future that completes when rollouts are queued; enter before claiming, so that none is missed."""
        with self._work.subscribe(self.project) as future:
            yield future

    @property
    def waiting_for_work_count(self) -> int:
        """Number of workers that wait for work, of all projects."""
        return self._work.waiting

    def seconds_to_retry(self) -> float | None:
        """Seconds until a queued rollout becomes claimable; None when none is queued."""
        ready_ns = self._read(queue.next_ready_ns)
        return None if ready_ns is None else max(0.0, (ready_ns - self._clock()) / 1e9)

    # --- keys ------------------------------------------------------------------------------------

    def mint_key(self, scope: Scope, name: str = "", expires_ns: int | None = None) -> str:
        """Make a key of this project; this is the only time it can be seen."""
        owner = Principal(scope, self.project, expires_ns=expires_ns)
        return self._submit(lambda write: keys.write_key(write, owner, name)).result()

    @contextmanager
    def temporary_key(self, scope: Scope, name: str) -> Generator[str]:
        """A key that works while the block runs."""
        key = self.mint_key(scope, name)
        try:
            yield key
        finally:
            key_hash = hash_key(key)
            self._submit(lambda write: keys.drop_key(write, key_hash)).result()

    def keys(self) -> Sequence[KeyInfo]:
        """The project's keys, without those of attempts."""
        return self._read(keys.list_keys)

    def revoke_key(self, key_id: str) -> None:
        """The key no longer works when this returns. Raises NotFound."""
        self._submit(lambda write: keys.revoke_key(write, key_id)).result()

    def cached_principal(self, key: str) -> Principal | None:
        """Whom the key belongs to, of whatever project, if that was asked before; never blocks."""
        return self._in_time(self._keys.get(hash_key(key)))

    def principal(self, key: str) -> Principal | None:
        """Whom the key belongs to; None for one that is unknown, revoked, expired or of an ended attempt."""
        key_hash = hash_key(key)

        def read() -> Principal | None:
            return self._read(lambda read: keys.read_key(read.connection, key_hash))

        return self._in_time(self._keys.look_up(key_hash, read))

    def _in_time(self, owner: Principal | None) -> Principal | None:
        return None if owner is None or owner.expired(self._clock()) else owner

    # --- retention -------------------------------------------------------------------------------

    def delete_old(self, rule: Retention) -> int:
        """Delete final rollouts of all projects that the rule lets go, some at a time; how many."""
        deleted = 0
        if rule.older_than_ns is not None:
            before_ns = self._clock() - rule.older_than_ns
            while part := self._delete_some(before_ns)[0]:
                deleted += part
        if rule.larger_than_bytes is not None:
            excess = self.used_bytes() - rule.larger_than_bytes
            while excess > 0 and (part := self._delete_some(None))[0]:
                deleted, excess = deleted + part[0], excess - part[1]
        return deleted

    def _delete_some(self, before_ns: int | None) -> tuple[int, int]:
        return self._submit(lambda write: retention.delete_some(write, before_ns)).result()

    def used_bytes(self) -> int:
        """Bytes that the rows of all projects take."""
        return self._read(lambda read: retention.used_bytes(read.connection))

    def projects(self) -> Sequence[str]:
        """Names of the projects that hold something."""
        return self._read(lambda read: reads.projects(read.connection))

    # --- training runs ---------------------------------------------------------------------------

    def set_run(self, run_id: str, state: JsonObject) -> None:
        """Store what a training run needs to go on, in place of what was there."""
        blob = rows.to_json(cast(Json, state), f"the state of run {run_id!r}")

        def run(write: Write) -> None:
            new = {"project": write.project, "id": run_id, "state": blob}
            new |= {"created_ns": write.now_ns, "updated_ns": write.now_ns}
            write.connection.execute(_insert_run, new)
            write.execute(_update_run, the_id=run_id, the_state=blob, now_ns=write.now_ns)

        self._submit(run, size=len(blob)).result()

    def run(self, run_id: str) -> dict[str, Any] | None:
        """What `set_run` stored; None when there is no such run."""
        return self._read(lambda read: reads.run_state(read, run_id))

    def runs(self) -> Sequence[str]:
        """Ids of the training runs, oldest first."""
        return self._read(reads.run_ids)

    # --- plumbing --------------------------------------------------------------------------------

    def _submit_rows(self, span_rows: Sequence[SpanRow], *, wait_for_room: bool) -> Future[None]:
        return self._submit(
            lambda write: write_spans(write, span_rows, self._known),
            size=sum(map(row_size, span_rows)),
            wait_for_room=wait_for_room,
            refuses=False,
        )

    def _stamp(self, reward: Reward) -> Reward:
        if not abs(reward.value) <= FLOAT32_MAX:
            raise InvalidReward(
                f"reward {reward.name!r} is {reward.value}: give a number finite as a float32"
            )
        if reward.time_ns:
            return reward
        return Reward(float(reward.value), reward.name, reward.target, self._clock())


__all__ = ["Principal", "RolloutFilter", "Scope", "Store"]
