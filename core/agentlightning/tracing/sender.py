"""The background sender of both tracers: a bounded queue, one daemon thread, OTLP/JSON over HTTP.

The thread starts with the first span, and again in a forked child, where spans that the parent had not sent
yet are left to the parent. Batches are retried while the server is away or busy; what cannot be delivered is
counted in `dropped` and logged once per cause.
"""

from __future__ import annotations

import atexit
import contextlib
import gzip
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from functools import cache
from http.client import HTTPException
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from agentlightning.errors import InvalidInput
from agentlightning.otlp import encode_request
from agentlightning.tracing.guard import record_failure, warn
from agentlightning.types import Span

MAX_QUEUE: Final = 8192  # spans; at 6 KB each about 50 MB of the agent's memory
MAX_BATCH: Final = 512  # spans a request
MAX_TEXT: Final = 4 * 2**20  # characters a request; the server takes 20 MiB, and texts may need more bytes
DELAY_S: Final = 1.0  # that a span waits at most for others to travel with
REQUEST_TIMEOUT_S: Final = 10.0
RETRY_FOR_S: Final = 60.0  # a batch is given up after this long
BACKOFF_S: Final = 0.1  # doubles up to MAX_BACKOFF_S
MAX_BACKOFF_S: Final = 5.0
EXIT_TIMEOUT_S: Final = 5.0
COMPRESSION: Final = 1  # of gzip's nine: the others take longer than the network saves
_RETRY_STATUS: Final = frozenset({408, 425, 429, 502, 503, 504})


def worth_compressing(url: str) -> bool:
    """Whether the server is on another machine; to this one, compressing costs more than sending."""
    host = urlsplit(url).hostname or ""
    return not (host in ("localhost", "::1") or host.startswith("127."))


class HttpSender:
    """Sends spans to `{url}/v1/traces`."""

    def __init__(
        self, url: str, key: str = "", *, max_queue: int = MAX_QUEUE, retry_for_s: float = RETRY_FOR_S
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise InvalidInput(f"The server's URL must begin with http:// or https://, not {url!r}.")
        self._endpoint = url.rstrip("/") + "/v1/traces"
        self._compress = worth_compressing(url)
        self._key = key
        self._max_queue = max_queue
        self._retry_for_s = retry_for_s
        self._warned: set[str] = set()
        self.dropped = 0
        self._stopped = False
        self._reset()
        _forget_after_fork(self)
        _flush_at_exit(self)

    def _reset(self) -> None:
        self._queue: deque[Span] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._idle = threading.Condition(self._lock)
        self._sending = 0
        self._thread: threading.Thread | None = None
        self._give_up_at = float("inf")

    def put(self, span: Span) -> None:
        with self._lock:
            if self._stopped or len(self._queue) >= self._max_queue:
                self.dropped += 1
                full = not self._stopped
            else:
                self._queue.append(span)
                full = False
                if self._thread is None:
                    self._start()
            if len(self._queue) >= MAX_BATCH:
                self._wake.set()
        if full:
            self._warn_once("full", "The queue of spans is full (%d); spans are dropped.", self._max_queue)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="agentlightning-sender", daemon=True)
        with contextlib.suppress(RuntimeError):  # the interpreter is shutting down: `shutdown` sends instead
            thread.start()
            self._thread = thread

    def flush(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        with self._idle:
            self._wake.set()
            while self._queue or self._sending:
                if self._thread is None or not self._idle.wait(max(0.0, deadline - time.monotonic())):
                    return False
        return True

    def shutdown(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            self._give_up_at = deadline
            thread = self._thread
            self._wake.set()
        if thread is not None:
            thread.join(timeout_s)
        elif self._queue:
            self._run()
        with self._lock:
            left = len(self._queue) + self._sending
            self._queue.clear()
            self.dropped += left
        if left:
            warn("%d spans were not sent before the process ended. Is %s reachable?", left, self._endpoint)

    # --- in the thread ---

    def _run(self) -> None:
        while True:
            self._wake.wait(DELAY_S)
            self._wake.clear()
            while batch := self._take():
                try:
                    self._deliver(batch)
                except Exception as error:
                    self._drop(len(batch))
                    record_failure("agentlightning.tracing.sender", error)
                finally:
                    with self._idle:
                        self._sending = 0
                        self._idle.notify_all()
            if self._stopped and not self._queue:
                return

    def _take(self) -> list[Span]:
        with self._lock:
            batch: list[Span] = []
            text = 0
            while self._queue and len(batch) < MAX_BATCH:
                text += _length(self._queue[0])
                if batch and text > MAX_TEXT:
                    break
                batch.append(self._queue.popleft())
            self._sending = len(batch)
            return batch

    def _deliver(self, batch: Sequence[Span]) -> None:
        body = encode_request(batch)
        if self._compress:
            body = gzip.compress(body, compresslevel=COMPRESSION)
        give_up_at = time.monotonic() + self._retry_for_s
        wait_s = BACKOFF_S
        while True:
            status, answer, retry_after_s = self._post(body)
            if status == 200:
                self._count_rejected(answer)
                return
            if status in (400, 413) and len(batch) > 1:  # one bad or large span must not cost the others
                self._deliver(batch[: len(batch) // 2])
                self._deliver(batch[len(batch) // 2 :])
                return
            if status is not None and status not in _RETRY_STATUS:
                self._refused(status, answer, len(batch))
                return
            wait_s = retry_after_s or wait_s
            if time.monotonic() + wait_s > min(give_up_at, self._give_up_at):
                self._drop(len(batch))
                self._warn_once("away", "%s does not answer (%s); spans are dropped.", self._endpoint, answer)
                return
            self._sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_BACKOFF_S)

    def _sleep(self, seconds: float) -> None:
        """Wait, but wake for a shutdown, which brings the deadline forward."""
        end = min(time.monotonic() + seconds, self._give_up_at)
        while (left := min(end, self._give_up_at) - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))

    def _post(self, body: bytes) -> tuple[int | None, str, float | None]:
        """Status (None when there was no answer), the answer's text, and how long it asks to wait."""
        import urllib.error
        import urllib.request

        headers = {"Content-Type": "application/json"}
        if self._compress:
            headers["Content-Encoding"] = "gzip"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._endpoint, body, headers, method="POST")
        timeout_s = max(0.1, min(REQUEST_TIMEOUT_S, self._give_up_at - time.monotonic()))
        try:
            with _opener().open(request, timeout=timeout_s) as response:
                return 200, response.read(1 << 20).decode("utf-8", "replace"), None
        except urllib.error.HTTPError as error:
            with error:
                answer = error.read(1 << 16).decode("utf-8", "replace")
            return error.code, answer, _seconds(error.headers.get("Retry-After"))
        except (OSError, ValueError, HTTPException) as error:  # the last two: an answer that is no HTTP
            return None, str(error) or type(error).__name__, None

    def _count_rejected(self, answer: str) -> None:
        rejected, message = _partial_success(answer)
        if rejected:
            self._drop(rejected)
            self._warn_once("rejected", "The server rejected spans: %s", message)

    def _refused(self, status: int, answer: str, spans: int) -> None:
        self._drop(spans)
        remedy = "Check the key (AGENTLIGHTNING_KEY)." if status in (401, 403) else "Spans are dropped."
        if 300 <= status < 400:
            remedy = "It redirects: name the URL that it redirects to (AGENTLIGHTNING_URL)."
        self._warn_once(
            str(status), "%s refused spans with %d: %.300s. %s", self._endpoint, status, answer, remedy
        )

    def _drop(self, spans: int) -> None:
        with self._lock:
            self.dropped += spans

    def _warn_once(self, cause: str, message: str, *args: object) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            warn(message, *args)

    def forget(self) -> None:
        """In a forked child: start over with an empty queue, the parent sends its own."""
        self.dropped = 0
        self._reset()


def _length(span: Span) -> int:
    """Characters of a span's texts, which are nearly all there is of it."""
    return sum(len(value) for value in span.attributes.values() if isinstance(value, (str, bytes)))


@cache
def _opener() -> Any:
    """Opens URLs as urllib does, but follows no redirect: it would take the key elsewhere."""
    import urllib.request

    class Stays(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any, **__: Any) -> None:
            return None

    return urllib.request.build_opener(Stays)


def _partial_success(answer: str) -> tuple[int, str]:
    """Number of rejected spans and why, from an ExportTraceServiceResponse."""
    try:
        partial: dict[str, Any] = orjson.loads(answer or "{}").get("partialSuccess") or {}
        return int(partial.get("rejectedSpans") or 0), str(partial.get("errorMessage"))
    except (ValueError, AttributeError, TypeError):
        return 0, ""


def _seconds(value: str | None) -> float | None:
    try:
        return min(max(float(value or ""), 0.05), 30.0)
    except ValueError:
        return None


def _forget_after_fork(sender: HttpSender) -> None:
    weak = weakref.WeakMethod(sender.forget)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: (weak() or _nothing)())


def _flush_at_exit(sender: HttpSender) -> None:
    weak = weakref.ref(sender)

    def stop() -> None:
        living = weak()
        if living is not None:
            living.shutdown(EXIT_TIMEOUT_S)

    atexit.register(stop)


def _nothing() -> None: ...
