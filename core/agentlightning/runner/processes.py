"""Running attempts in processes of their own: the worker's side of the launcher.

Invariant: when `run` returns, no process of that attempt is left; when `close` returns, none at all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentlightning import context
from agentlightning.errors import AgentLightningError, InvalidInput
from agentlightning.runner.agent import Agent, Outcome, reference_of
from agentlightning.runner.launcher_process import signal_group
from agentlightning.types import AttemptStatus, Claim
from agentlightning.wire import claim_to_json

TERM_GRACE_S = 2.0  # between SIGTERM and SIGKILL
GONE_S = 30.0  # for the kernel to end a killed process; longer means it hangs in the kernel
IMPORT_S = 300.0  # for the agent's module to be imported
_SECRETS = ("AGENTLIGHTNING_ADMIN_KEY", context.ENV_KEY, context.ENV_ATTEMPT_ID, context.ENV_ROLLOUT_ID)


@dataclass(slots=True)
class _Attempt:
    ended: Future[int] = field(default_factory=Future[int])
    """Completes with the exit code, or fails when the launcher died."""
    pid: int | None = None


class ProcessExecutor:
    """Runs attempts in processes forked from a launcher that has imported the agent. Thread-safe."""

    def __init__(self, agent: Agent | str, server_url: str, *, term_grace_s: float = TERM_GRACE_S) -> None:
        if not hasattr(os, "fork"):
            raise InvalidInput('this platform cannot fork processes: use isolation="inline"')
        self._reference = reference_of(agent)
        self._server_url = server_url
        self._term_grace_s = term_grace_s
        self._lock = threading.Lock()
        self._launcher: _Launcher | None = None
        self._numbers = itertools.count()
        self._folder = Path(tempfile.mkdtemp(prefix="agentlightning-"))  # mode 0700

    def start(self) -> None:
        """Import the agent in the launcher. Raises InvalidInput with its error when that fails."""
        self._running_launcher()

    def close(self) -> None:
        """End everything."""
        with self._lock:
            launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, claim: Claim, timeout_s: float) -> Outcome:
        """Run one attempt to its end and return how it ended. Blocks."""
        try:
            launcher = self._running_launcher()
        except AgentLightningError as error:
            return Outcome(AttemptStatus.FAILED, str(error))
        path = self._folder / f"{next(self._numbers)}.json"
        attempt = launcher.run(claim, path)
        try:
            timed_out = not _wait(attempt.ended, timeout_s)
            if timed_out:
                launcher.stop(claim.attempt.id, self._term_grace_s)
                _wait(attempt.ended, self._term_grace_s + GONE_S)
            return _outcome(path, attempt.ended, timeout_s if timed_out else None)
        finally:
            launcher.forget(claim.attempt.id)
            path.unlink(missing_ok=True)

    def end(self, attempt_id: str) -> None:
        """End a running attempt; its `run` returns soon after. Unknown ids are ignored."""
        with self._lock:
            launcher = self._launcher
        if launcher is not None:
            launcher.stop(attempt_id, self._term_grace_s)

    def _running_launcher(self) -> _Launcher:
        with self._lock:
            if self._launcher is None or not self._launcher.alive:
                if self._launcher is not None:
                    self._launcher.close()
                self._launcher = _Launcher(self._reference, self._server_url)
            return self._launcher


def _wait(ended: Future[int], timeout_s: float) -> bool:
    try:
        ended.exception(timeout_s)
    except TimeoutError:
        return False
    return True


def _outcome(path: Path, ended: Future[int], timeout_s: float | None) -> Outcome:
    """What the child wrote, else what its end tells."""
    if timeout_s is not None:
        still = "" if ended.done() else " and its process hangs in the kernel"
        return Outcome(AttemptStatus.TIMED_OUT, f"the agent was ended after {timeout_s:g} s{still}")
    try:
        return Outcome.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return Outcome(AttemptStatus.FAILED, _epitaph(ended))
    except ValueError as error:
        return Outcome(AttemptStatus.FAILED, f"the outcome of the agent's process cannot be read: {error}")


def _epitaph(ended: Future[int]) -> str:
    if ended.exception() is not None:
        return f"the process that launches attempts died: {ended.exception()}"
    code = ended.result()
    if code >= 0:
        return f"the agent ended its own process with exit code {code} (os._exit?): return or raise instead"
    name = signal.Signals(-code).name
    hint = ": was the machine out of memory?" if name == "SIGKILL" else ""
    return f"the agent's process was killed by {name}{hint}"


class _Launcher:
    """A running launcher process and the thread that listens to it."""

    def __init__(self, reference: str, server_url: str) -> None:
        self._attempts: dict[str, _Attempt] = {}
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._ready: Future[None] = Future()
        self._socket, theirs = socket.socketpair()
        with theirs:
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; "
                "from agentlightning.runner.launcher_process import main; "
                f"main({theirs.fileno()}, {server_url!r}, {reference!r})"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal reaches the worker alone
                env={name: value for name, value in os.environ.items() if name not in _SECRETS},
            )
        threading.Thread(target=self._listen, name="agentlightning-launcher", daemon=True).start()
        try:
            self._ready.result(IMPORT_S)
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._process.poll() is None and self._ready.done()

    def close(self) -> None:
        """Closing the socket tells the launcher to kill all attempts and end."""
        _hang_up(self._socket)
        try:
            self._process.wait(GONE_S)
        except subprocess.TimeoutExpired:  # busy importing the agent: it has no attempts yet
            self._process.kill()
            self._process.wait()
        self._kill_orphans()

    def run(self, claim: Claim, outcome: Path) -> _Attempt:
        attempt = _Attempt()
        with self._lock:
            self._attempts[claim.attempt.id] = attempt
        command = {
            "op": "run",
            "id": claim.attempt.id,
            "claim": claim_to_json(claim),
            "outcome": str(outcome),
        }
        self._tell(command)
        if not self.alive:  # it died before it could be asked; nobody else will say so
            self._fail_all()
        return attempt

    def stop(self, attempt_id: str, grace_s: float) -> None:
        self._tell({"op": "stop", "id": attempt_id, "grace_s": grace_s})

    def forget(self, attempt_id: str) -> None:
        with self._lock:
            self._attempts.pop(attempt_id, None)

    def _tell(self, command: dict[str, Any]) -> None:
        try:
            with self._send_lock:
                self._socket.sendall(json.dumps(command).encode() + b"\n")
        except OSError:
            self._fail_all()

    def _listen(self) -> None:
        with self._socket.makefile("rb") as lines, contextlib.suppress(OSError, ValueError):
            for line in lines:
                self._hear(json.loads(line))
        self._fail_all()

    def _hear(self, event: dict[str, Any]) -> None:
        match event["op"]:
            case "ready":
                self._ready.set_result(None)
            case "broken":
                self._ready.set_exception(InvalidInput(f"the agent cannot be loaded: {event['error']}"))
            case _:
                with self._lock:
                    attempt = self._attempts.get(event["id"])
                    if attempt is None:
                        return
                    if event["op"] == "started":
                        attempt.pid = event["pid"]
                    elif not attempt.ended.done():
                        attempt.ended.set_result(event["code"])

    def _fail_all(self) -> None:
        self._kill_orphans()
        code = self._process.poll()
        error = AgentLightningError(f"its exit code was {code}")
        if not self._ready.done():
            self._ready.set_exception(InvalidInput(f"importing the agent ended the process: {error}"))
        with self._lock:
            for attempt in self._attempts.values():
                if not attempt.ended.done():
                    attempt.ended.set_exception(error)

    def _kill_orphans(self) -> None:
        """For a launcher that could not end its attempts itself."""
        with self._lock:
            pids = [a.pid for a in self._attempts.values() if a.pid is not None and not a.ended.done()]
        for pid in pids:
            signal_group(pid, signal.SIGKILL)


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # also ends the listening thread's read
    sock.close()
