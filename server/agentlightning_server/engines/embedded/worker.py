"""The one thread that computes: it decodes while requests come in, and runs jobs between generations.

Each policy has a decoder, and those with something to do take turns, token by token. All tensor work happens
on this thread, so nothing else needs a lock. A job (an update, a save, a load) waits until generations under
way are finished; requests that come meanwhile wait for the job. An error while decoding fails the requests
under way and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from agentlightning.errors import Unavailable

from .decoding import Decoder
from .lanes import DecodeStats, Request, settle

T = TypeVar("T")

_BUSY_RETRY_S = 2.0
_MAX_GATHERS = 20  # times `gather_s` at most, while requests keep coming


class Worker:
    """Owns the decoders. `submit` and `run` may be called from any thread but its own."""

    def __init__(
        self, decoders: Mapping[str, Decoder], *, queue_size: int, gather_s: float, stats: DecodeStats
    ) -> None:
        self._decoders = decoders
        self._queue_size = queue_size
        self._gather_s = gather_s
        self._stats = stats
        self._waiting: Mapping[str, deque[Request]] = {name: deque() for name in decoders}
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="embedded-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, policy: str) -> None:
        """Queue a request for a policy. Raises Unavailable when the queue is full or the engine closed."""
        with self._changed:
            self._check_open()
            if self._queued >= self._queue_size:
                raise Unavailable(
                    f"{self._queued} requests are waiting for the model: try again later, "
                    "or raise queue_size",
                    retry_after_s=_BUSY_RETRY_S,
                )
            self._waiting[policy].append(request)
            self._changed.notify()

    @property
    def _queued(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def _busy(self) -> bool:
        return any(decoder.busy for decoder in self._decoders.values())

    def run(self, job: Callable[[], T]) -> T:
        """Run a job on the worker's thread once no generation is under way, and return its result."""
        done: Future[T] = Future()
        with self._changed:
            self._check_open()
            self._jobs.append((job, done))
            self._changed.notify()
        return done.result()

    def close(self) -> None:
        """Fail what is waiting or under way, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the engine is closed: start the server again")

    def _loop(self) -> None:
        while self._await_work():
            start = time.perf_counter()
            try:
                self._turn()
            except Exception as error:
                self._abort(error)
            self._stats.seconds += time.perf_counter() - start
        self._shut_down()

    def _await_work(self) -> bool:
        """Block until there is something to do; False when closed."""
        with self._changed:
            if not self._busy and not self._jobs:
                idle = not self._queued
                self._changed.wait_for(lambda: self._closed or self._jobs or self._queued)
                if idle and self._gather_s:
                    self._gather()
            return not self._closed

    def _gather(self) -> None:
        """Wait until no more requests come in, so that those which belong together share their work."""
        deadline = time.monotonic() + _MAX_GATHERS * self._gather_s
        seen = 0
        while seen < self._queued and time.monotonic() < deadline:
            seen = self._queued
            self._changed.wait_for(lambda: self._closed or self._jobs, timeout=self._gather_s)

    def _turn(self) -> None:
        if self._jobs and not self._busy:
            self._do(*self._jobs.popleft())
            return
        for name, decoder in self._decoders.items():
            if decoder.busy or self._waiting[name]:
                decoder.admit(self._waiting[name], new=not self._jobs)
                decoder.step()

    def _abort(self, error: BaseException) -> None:
        for decoder in self._decoders.values():
            decoder.abort(error)

    def _do(self, job: Callable[[], Any], done: Future[Any]) -> None:
        try:
            done.set_result(job())
        except BaseException as error:
            done.set_exception(error)

    def _shut_down(self) -> None:
        closed = Unavailable("the engine was closed before this was done")
        self._abort(closed)
        for waiting in self._waiting.values():
            while waiting:
                settle(waiting.popleft().future, closed)
        while self._jobs:
            self._jobs.popleft()[1].set_exception(closed)
