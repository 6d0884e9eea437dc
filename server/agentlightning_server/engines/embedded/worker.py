"""The one thread that computes: it decodes while requests come in, and runs jobs between generations.

All tensor work happens on this thread, so nothing else needs a lock. A job (an update, a save, a load) waits
until generations under way are finished; requests that come meanwhile wait for the job. An error while
decoding fails the requests under way and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from agentlightning.errors import Unavailable

from .decoding import Decoder
from .lanes import Request, settle

T = TypeVar("T")

_BUSY_RETRY_S = 2.0
_MAX_GATHERS = 20  # times `gather_s` at most, while requests keep coming


class Worker:
    """Owns the decoder. `submit` and `run` may be called from any thread but its own."""

    def __init__(self, decoder: Decoder, *, queue_size: int, gather_s: float) -> None:
        self._decoder = decoder
        self._queue_size = queue_size
        self._gather_s = gather_s
        self._waiting: deque[Request] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="embedded-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises Unavailable when the queue is full or the engine closed."""
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self._queue_size:
                raise Unavailable(
                    f"{len(self._waiting)} requests are waiting for the model: try again later, "
                    "or raise queue_size",
                    retry_after_s=_BUSY_RETRY_S,
                )
            self._waiting.append(request)
            self._changed.notify()

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
                self._decoder.abort(error)
            self._decoder.stats.seconds += time.perf_counter() - start
        self._shut_down()

    def _await_work(self) -> bool:
        """Block until there is something to do; False when closed."""
        with self._changed:
            if not self._decoder.busy and not self._jobs:
                idle = not self._waiting
                self._changed.wait_for(lambda: self._closed or self._jobs or self._waiting)
                if idle and self._gather_s:
                    self._gather()
            return not self._closed

    def _gather(self) -> None:
        """Wait until no more requests come in, so that those which belong together share their work."""
        deadline = time.monotonic() + _MAX_GATHERS * self._gather_s
        seen = 0
        while seen < len(self._waiting) and time.monotonic() < deadline:
            seen = len(self._waiting)
            self._changed.wait_for(lambda: self._closed or self._jobs, timeout=self._gather_s)

    def _turn(self) -> None:
        if self._jobs and not self._decoder.busy:
            self._do(*self._jobs.popleft())
            return
        self._decoder.admit(self._waiting, new=not self._jobs)
        self._decoder.step()

    def _do(self, job: Callable[[], Any], done: Future[Any]) -> None:
        try:
            done.set_result(job())
        except BaseException as error:
            done.set_exception(error)

    def _shut_down(self) -> None:
        closed = Unavailable("the engine was closed before this was done")
        self._decoder.abort(closed)
        while self._waiting:
            settle(self._waiting.popleft().future, closed)
        while self._jobs:
            self._jobs.popleft()[1].set_exception(closed)
