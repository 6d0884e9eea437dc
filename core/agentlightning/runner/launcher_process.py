"""The launcher: a process that has imported the agent, and forks itself for every attempt.

So importing an agent framework costs its seconds once, and an attempt a few milliseconds. It has one thread,
which never runs the agent's code after the import, so it always answers. Commands come as JSON lines over a
socket from the worker, and their end is the end of everything:

    worker -> {"op": "run", "id", "claim", "outcome"} | {"op": "stop", "id", "grace_s"}
    worker <- {"op": "ready"} | {"op": "broken", "error"}
            | {"op": "started", "id", "pid"} | {"op": "ended", "id", "code"}

Why not `multiprocessing`'s fork server: its children outlive a worker that was killed, it imports `__main__`
again, and hides the error when the agent cannot be imported.
Invariants: each attempt leads a process group, which is killed before the leader is reaped, so no group id is
ever reused under us; when the worker is gone, so are all attempts. Linux also returns descendants that left
their group (subreaper) and ends attempts whose launcher was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentlightning import context
from agentlightning.errors import AgentLightningError
from agentlightning.runner.agent import Agent, load
from agentlightning.runner.child import run_attempt
from agentlightning.tracing.process import TracerName, build_tracer
from agentlightning.wire import claim_from_json

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
_LINUX = sys.platform == "linux"


@dataclass(slots=True)
class _Child:
    """A running attempt."""

    id: str
    kill_at: float | None = None
    """Monotonic time of SIGKILL, once SIGTERM was sent."""


class LauncherProcess:
    """The main loop around one socket."""

    def __init__(self, sock: socket.socket, server_url: str, agent: Agent) -> None:
        self._socket = sock
        self._server_url = server_url
        self._agent = agent
        self._children: dict[int, _Child] = {}
        self._received = b""
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        signal.signal(signal.SIGCHLD, _do_nothing)  # must be handled for the wakeup to happen
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve until the worker closes the socket, then end all attempts."""
        self._tell({"op": "ready"})
        try:
            while self._serve_once():
                pass
        finally:
            self._kill_all()

    def _serve_once(self) -> bool:
        ready = {key.fileobj for key, _ in self._selector.select(self._seconds_to_next_kill())}
        if self._woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)
        self._reap()
        self._kill_overdue()
        return self._socket not in ready or self._receive()

    def _receive(self) -> bool:
        try:
            data = self._socket.recv(1 << 20)
        except ConnectionResetError:
            data = b""
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            self._obey(json.loads(line))
        return bool(data)

    def _obey(self, command: dict[str, Any]) -> None:
        if command["op"] == "run":
            self._fork(command)
        else:
            self._terminate(command["id"], command["grace_s"])

    def _tell(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the next read sees the end
            self._socket.sendall(json.dumps(event).encode() + b"\n")

    # --- one attempt -----------------------------------------------------------------------------

    def _fork(self, command: dict[str, Any]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        launcher_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_attempt(command, launcher_pid)
        self._children[pid] = _Child(command["id"])
        self._tell({"op": "started", "id": command["id"], "pid": pid})

    def _become_attempt(self, command: dict[str, Any], launcher_pid: int) -> None:
        """In the child; never returns."""
        code = 1
        try:
            os.setsid()
            die_with_parent(launcher_pid)
            self._forget_launcher()
            claim = claim_from_json(command["claim"])
            run_attempt(self._agent, claim, self._server_url, Path(command["outcome"]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)  # not sys.exit: threads that the agent left behind must not hold the process

    def _forget_launcher(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._selector.close()
        self._socket.close()
        os.close(self._woken)
        os.close(self._waker)

    def _terminate(self, attempt_id: str, grace_s: float) -> None:
        for pid, child in self._children.items():
            if child.id == attempt_id and child.kill_at is None:
                child.kill_at = time.monotonic() + grace_s
                signal_group(pid, signal.SIGTERM)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for pid, child in self._children.items():
            if child.kill_at is not None and child.kill_at <= now:
                signal_group(pid, signal.SIGKILL)
                child.kill_at = now + 1.0  # again, for a child that was not yet leading its group

    def _seconds_to_next_kill(self) -> float | None:
        times = [child.kill_at for child in self._children.values() if child.kill_at is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _reap(self) -> None:
        ended = False
        while (pid := _ended_child()) is not None:
            child = self._children.pop(pid, None)
            if child is not None:
                # What the agent started dies while the leader's zombie still holds the group's id.
                signal_group(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if child is not None:
                ended = True
                self._tell({"op": "ended", "id": child.id, "code": os.waitstatus_to_exitcode(status)})
        if ended:
            self._kill_strays()

    def _kill_strays(self) -> None:
        """End descendants of ended attempts that had left their group; Linux has given them to us."""
        running = {child.id for child in self._children.values()}
        for pid in _own_children() - self._children.keys():
            owner = _attempt_of(pid)
            if owner not in running and (owner is not None or not running):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _kill_all(self) -> None:
        for pid in self._children:
            signal_group(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            for pid in _own_children() - self._children.keys():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                time.sleep(0.005)


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signal a process and its group. That some of it is gone already is fine."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, number)


def _ended_child() -> int | None:
    """A child that has ended, left as a zombie for now."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if found is None else found.si_pid


def _own_children() -> set[int]:
    try:
        return set(map(int, Path("/proc/thread-self/children").read_text().split()))
    except OSError:  # not Linux
        return set()


def _attempt_of(pid: int) -> str | None:
    """The attempt in whose environment a program was started."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    prefix = context.ENV_ATTEMPT_ID.encode() + b"="
    return next((entry[len(prefix) :].decode() for entry in environment if entry.startswith(prefix)), None)


def _do_nothing(_number: int, _frame: object) -> None: ...


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def die_with_parent(parent_pid: int) -> None:
    """Have Linux kill this process when its parent dies."""
    if _LINUX:
        _prctl(_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died before we asked
            os._exit(1)


def main(fd: int, server_url: str, reference: str) -> None:
    """Entry of the launcher process; `fd` is its end of the socket. Never returns."""
    try:
        _launch(fd, server_url, reference)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)  # not sys.exit: threads that the agent's import started must not hold the process


def _launch(fd: int, server_url: str, reference: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's to handle
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    if _LINUX:
        _prctl(_SET_CHILD_SUBREAPER, 1)
    try:
        agent = load(reference)
        _warm_up_tracing()
    except BaseException as error:
        text = str(error) if isinstance(error, AgentLightningError) else traceback.format_exc()
        sock.sendall(json.dumps({"op": "broken", "error": text}).encode() + b"\n")
        return
    gc.collect()
    gc.freeze()  # the collector of a child would otherwise copy every page of what was imported
    LauncherProcess(sock, server_url, agent).run()


def _warm_up_tracing() -> None:
    """Import what every attempt would import anyway: 100 ms each for OpenTelemetry's exporter."""
    name = cast(TracerName, os.environ.get(context.ENV_TRACER, "otel"))
    build_tracer("http://127.0.0.1:1", "", name).shutdown()  # sends nothing: nothing was recorded
