"""`Worker`: leases rollouts from a server, runs the agent on them, keeps the leases, reports the ends.

Not here: how an attempt runs (`processes`, `inline`). Invariants: an attempt is reported once, by the worker
that holds it; a worker that stops, by whatever cause, loses no rollout: what it did not finish is retried.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

from agentlightning.client import LightningClient
from agentlightning.errors import (
    Conflict,
    InvalidInput,
    NotFound,
    StoreError,
    Unavailable,
)
from agentlightning.runner.agent import Agent, Outcome
from agentlightning.runner.inline import InlineExecutor
from agentlightning.runner.processes import ProcessExecutor
from agentlightning.types import AttemptStatus, Claim

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0  # a third of the server's lease
CLAIM_POLL_S = 1.0  # short, since stopping waits for it
RECONNECT_S = 1.0
END_AGAIN_S = 1.0  # an attempt that was not yet running when it was told to end is told again
GRACE_S = 30.0  # for attempts to finish when the worker is told to stop
REPORT_FOR_S = 60.0  # an unreported attempt is retried anyway once its lease has run out

Isolation = Literal["process", "inline"]
Ending = Literal["lost", "cancelled", "stopped"]


class Executor(Protocol):
    """Runs attempts."""

    def start(self) -> None: ...
    def run(self, claim: Claim, timeout_s: float) -> Outcome: ...
    def end(self, attempt_id: str) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class _Active:
    claim: Claim
    ending: Ending | None = None
    """Why it is being ended before its time."""


class Worker:
    """Runs `agent` on the server's rollouts, up to `concurrency` at a time.

    `agent` is a function at the top level of a module, or its reference "MODULE:FUNCTION"; see `agent` for
    what it takes and returns. `isolation` "process" gives each attempt its own process, so that a hung one is
    really ended; "inline" runs them in this process. `on_end` is told of each attempt, in its thread.
    """

    def __init__(
        self,
        client: LightningClient,
        agent: Agent | str,
        *,
        concurrency: int = 1,
        isolation: Isolation = "process",
        worker_id: str | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        grace_s: float = GRACE_S,
        on_end: Callable[[Claim, Outcome], None] | None = None,
    ) -> None:
        if concurrency < 1:
            raise InvalidInput(f"concurrency must be at least 1, got {concurrency}")
        self.id = worker_id or f"{socket.gethostname()[:60]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._client = client
        self._concurrency = concurrency
        self._heartbeat_s = heartbeat_s
        self._grace_s = grace_s
        self._on_end = on_end
        self._executor: Executor = (
            ProcessExecutor(agent, client.url)
            if isolation == "process"
            else InlineExecutor(agent, client.url, client.key)
        )
        self._active: dict[str, _Active] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._hurry = False
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    # --- life ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until `stop`. Raises InvalidInput when the agent cannot be loaded, PermissionDenied for a
        wrong key; an unreachable server is waited for."""
        heart = threading.Thread(target=self._beat, name="agentlightning-heartbeat", daemon=True)
        try:
            self._executor.start()
            heart.start()
            with ThreadPoolExecutor(self._concurrency, "agentlightning-attempt") as pool:
                try:
                    self._take_work(pool)
                finally:
                    self.stop()
                    self._drain()
            heart.join()  # it may be in the middle of a request
        finally:
            self.stop()
            self._executor.close()

    def start(self) -> Worker:
        """`run` in a background thread, which `close` ends."""
        self._thread = threading.Thread(target=self._run_in_thread, name="agentlightning-worker", daemon=True)
        self._thread.start()
        return self

    def stop(self, *, at_once: bool = False) -> None:
        """Claim no more; `run` returns when the attempts under way have ended or the grace period has.

        `at_once` is no grace. Not for signal handlers: it takes a lock.
        """
        with self._changed:
            self._stopping = True
            self._hurry |= at_once
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the end of the background thread."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Stop and wait for the end of the background thread. Raises what ended it early."""
        self.stop()
        self.join()
        if self._failure is not None:
            raise self._failure

    @property
    def active(self) -> int:
        """Number of attempts under way."""
        return len(self._active)

    @property
    def failure(self) -> BaseException | None:
        """What ended the background thread early, if anything did."""
        return self._failure

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self._failure = error
            logger.error("the worker has ended: %s", error)

    # --- claiming --------------------------------------------------------------------------------

    def _take_work(self, pool: ThreadPoolExecutor) -> None:
        while (free := self._wait_for_room()) > 0:
            for claim in self._claim(free):
                with self._changed:
                    self._active[claim.attempt.id] = _Active(claim, "stopped" if self._stopping else None)
                pool.submit(self._work, self._active[claim.attempt.id])

    def _wait_for_room(self) -> int:
        """Free places, at least one; 0 when stopping."""
        with self._changed:
            while not self._stopping and len(self._active) >= self._concurrency:
                self._changed.wait()
            return 0 if self._stopping else self._concurrency - len(self._active)

    def _claim(self, limit: int) -> Sequence[Claim]:
        try:
            return self._client.claim(self.id, limit, CLAIM_POLL_S)
        except (Unavailable, StoreError) as error:
            logger.warning("no work: %s", error)
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, RECONNECT_S)
            return ()

    # --- one attempt -----------------------------------------------------------------------------

    def _work(self, active: _Active) -> None:
        claim = active.claim
        try:
            outcome = self._execute(active)
            if outcome is not None:
                self._report(claim, outcome)
                if self._on_end is not None:
                    self._on_end(claim, outcome)
        except Exception:
            logger.exception("attempt %s could not be brought to its end", claim.attempt.id)
        finally:
            with self._changed:
                del self._active[claim.attempt.id]
                self._changed.notify_all()

    def _execute(self, active: _Active) -> Outcome | None:
        """How it ended; None when that is nobody's business any more."""
        stopped = Outcome(AttemptStatus.CANCELLED, f"worker {self.id} was stopped before the agent had ended")
        if self._ending_of(active) == "stopped":
            return stopped
        outcome = self._executor.run(active.claim, active.claim.rollout.limits.start_to_close_s)
        ended_early = self._ending_of(active)
        if ended_early in ("lost", "cancelled"):
            return None
        finished = outcome.status is AttemptStatus.SUCCEEDED
        return stopped if ended_early == "stopped" and not finished else outcome

    def _ending_of(self, active: _Active) -> Ending | None:
        """Why it is being ended; other threads may have said so in the meantime."""
        with self._changed:
            return active.ending

    def _report(self, claim: Claim, outcome: Outcome) -> None:
        deadline = time.monotonic() + REPORT_FOR_S
        while True:
            try:
                self._finish(claim, outcome)
                return
            except (Conflict, NotFound) as error:
                logger.warning("the result of %s is not wanted: %s", claim.attempt.id, error)
                return
            except (Unavailable, StoreError) as error:
                if self._hurry or time.monotonic() > deadline:
                    logger.warning("the result of %s cannot be reported: %s", claim.attempt.id, error)
                    return

    def _finish(self, claim: Claim, outcome: Outcome) -> None:
        try:
            self._client.finish(claim.attempt.id, self.id, outcome.status, outcome.error, outcome.rewards)
        except InvalidInput as error:
            self._client.finish(
                claim.attempt.id, self.id, AttemptStatus.FAILED, f"the outcome could not be sent: {error}"
            )

    # --- leases ----------------------------------------------------------------------------------

    def _beat(self) -> None:
        while self._wait_for_beat():
            with self._changed:
                active = list(self._active.values())
            for entry in active:
                if entry.ending is not None:
                    self._executor.end(entry.claim.attempt.id)
                    continue
                try:
                    self._renew(entry)
                except Exception as error:  # whatever it is, the next beat may go through
                    logger.warning("leases were not renewed: %s", error)
                    break

    def _wait_for_beat(self) -> bool:
        """Whether there is still something to keep alive, after one interval."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._stopping and not self._active, self._heartbeat_s)

    def _renew(self, entry: _Active) -> None:
        attempt_id = entry.claim.attempt.id
        try:
            if self._client.heartbeat(attempt_id, self.id):
                self._end(entry, "cancelled")
        except (Conflict, NotFound) as error:
            if attempt_id in self._active:  # else it was reported while we asked
                logger.warning("ending %s: %s", attempt_id, error)
                self._end(entry, "lost")

    def _end(self, entry: _Active, ending: Ending) -> None:
        with self._changed:
            if entry.ending is None:
                entry.ending = ending
        self._executor.end(entry.claim.attempt.id)

    def _drain(self) -> None:
        """Let attempts finish for the grace period, then end them, to be retried elsewhere."""
        with self._changed:
            self._changed.wait_for(lambda: not self._active or self._hurry, self._grace_s)
            left = list(self._active.values())
        if left:
            logger.warning("ending %d attempts that did not finish in time", len(left))
        while left:
            for entry in left:
                self._end(entry, "stopped")
            with self._changed:
                self._changed.wait_for(lambda: not self._active, END_AGAIN_S)
                left = list(self._active.values())
