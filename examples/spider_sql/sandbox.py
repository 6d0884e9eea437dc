"""SQL in processes of its own, which can be ended whatever the query does.

A query may run for ever, eat memory or crash SQLite: it then takes its worker with it and nothing else. The
workers are plain subprocesses (`sandbox_worker`), kept for the next query; they start no copy of the caller,
so it may have threads, an event loop or a GPU. Safe from many threads, and after a fork.
Invariant: a worker is in the pool only between requests; one that anything went wrong with is ended.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from agentlightning.errors import AgentLightningError, InvalidInput

WORKER = Path(__file__).with_name("sandbox_worker.py")
WORKERS = max(4, os.cpu_count() or 1)  # at the same time; further queries wait
START_TIMEOUT_S = 60.0
COMPANIONS = ("-wal", "-journal")  # of a database that somebody is writing, or that was not closed


class Worker:
    """One worker process. Not thread-safe."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        if self.reply(START_TIMEOUT_S) is None:
            self.end()
            raise AgentLightningError(f"the SQL worker did not start: try `{sys.executable} -I -S {WORKER}`")

    def ask(self, request: dict[str, Any]) -> None:
        """Send a request. A worker that has died is noticed at its reply."""
        with suppress(BrokenPipeError):
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()

    def reply(self, timeout_s: float) -> dict[str, Any] | None:
        """The next reply; None when the worker died first, or was killed because none came in time."""
        timer = threading.Timer(timeout_s, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            line = self._replies.readline()
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith("\n") else None

    def end(self) -> None:
        """End the process, now."""
        self._process.kill()
        self.forget()
        self._process.wait()

    def forget(self) -> None:
        """Close this process's ends of the pipes."""
        for pipe in (self._requests, self._replies):
            with suppress(OSError):
                pipe.close()


class Pool:
    """Workers that are kept for the next request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(WORKERS)
        self._idle: list[Worker] = []

    @contextmanager
    def worker(self) -> Generator[Worker]:
        """A worker for one request. It goes back to the pool unless the block raises."""
        with self._places:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            worker = worker or Worker()
            try:
                yield worker
            except BaseException:  # also a cancelled caller: half a conversation is not to be continued
                worker.end()
                raise
            with self._lock:
                self._idle.append(worker)

    def close(self) -> None:
        """End all idle workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()

    def forget(self) -> list[Worker]:
        """The idle workers, which belong to the parent of this forked process."""
        for worker in self._idle:
            worker.forget()
        return self._idle


class _Died(Exception):
    """The worker ended before it replied."""


_pool = Pool()
_inherited: list[Worker] = []  # kept, so that nobody waits for another process's child


def _after_fork() -> None:
    global _pool
    _inherited.extend(_pool.forget())
    _pool = Pool()


def close_workers() -> None:
    """End the idle workers now; else they end with this process."""
    _pool.close()


atexit.register(close_workers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def match(predicted: str, gold: str, database: Path, timeout_s: float) -> bool:
    """Whether the queries give the same result. Each may take `timeout_s`.

    Raises InvalidInput when there is no such database or `gold` does not run on it.
    """
    request = {"op": "match", "gold": gold, "predicted": predicted}
    failure = f"the gold query {gold!r} cannot be run on {database}"
    gold_ran = False
    try:
        with _asked(request, database, timeout_s) as worker:
            ran = _reply_of(worker, timeout_s)
            if "error" in ran:
                raise InvalidInput(f"{failure}: {ran['error']}")
            gold_ran = True
            return bool(_reply_of(worker, timeout_s)["match"])
    except _Died:
        if gold_ran:
            return False
        raise InvalidInput(f"{failure}: no result in {timeout_s:g} s, or no memory for it") from None


def run(query: str, database: Path, *, limit: int = 5, timeout_s: float = 10.0) -> str:
    """What a query gives, as a person or a model reads it: the first rows, or what is wrong with it."""
    try:
        with _asked({"op": "rows", "query": query, "limit": limit}, database, timeout_s) as worker:
            reply = _reply_of(worker, timeout_s)
    except _Died:
        return f"Error: no result in {timeout_s:g} s, or no memory for it"
    if "error" in reply:
        return f"Error: {reply['error']}"
    lines = [" | ".join(cells) for cells in (reply["columns"], *reply["rows"])]
    return "\n".join(lines) if reply["rows"] else f"{lines[0]}\n(no rows)"


def _reply_of(worker: Worker, timeout_s: float) -> dict[str, Any]:
    reply = worker.reply(timeout_s)
    if reply is None:
        raise _Died
    return reply


@contextmanager
def _asked(request: dict[str, Any], database: Path, timeout_s: float) -> Generator[Worker]:
    """A worker that was sent the request for this database."""
    if not timeout_s > 0:
        raise InvalidInput(f"timeout_s must be above zero, got {timeout_s}")
    if not database.is_file():
        raise InvalidInput(f"there is no database {database}")
    with ExitStack() as stack:
        uri = stack.enter_context(_still(database.absolute())).as_uri() + "?mode=ro&immutable=1"
        worker = stack.enter_context(_pool.worker())
        worker.ask({**request, "database": uri, "timeout_s": timeout_s})
        yield worker


@contextmanager
def _still(database: Path) -> Generator[Path]:
    """A database that can be read as it stands: a settled copy where a write ahead of it is not in it yet."""
    pending = [Path(f"{database}{suffix}") for suffix in COMPANIONS]
    pending = [file for file in pending if file.is_file() and file.stat().st_size]
    if not pending:
        yield database
        return
    import sqlite3

    with tempfile.TemporaryDirectory() as folder:
        for file in (database, *pending):
            shutil.copy(file, folder)
        copy = Path(folder) / database.name
        connection = sqlite3.connect(copy)
        with suppress(sqlite3.Error):  # what is not readable is said by the query
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        yield copy
