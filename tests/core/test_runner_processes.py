from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.stores import StoreServer, blocked, queued, store_server
from tests.support.waiting import wait_until

from agentlightning import semconv
from agentlightning.client import LightningClient
from agentlightning.runner import Worker
from agentlightning.types import AttemptStatus, Rollout, RolloutStatus, Task
from agentlightning_server.app import create_app, serve_in_thread
from agentlightning_server.settings import Settings
from agentlightning_server.store import Store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups are tested on Linux")

AGENT = "tests.core.sample_agents:obedient"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[StoreServer]:
    with store_server(tmp_path_factory.mktemp("processes")) as running:
        yield running


def todo(rollout_id: str, what: str, folder: Path | None = None, **limits: Any) -> Rollout:
    task: dict[str, Any] = {"do": what}
    if folder is not None:
        task |= {"pids": str(folder / "pids"), "file": str(folder / "file")}
    return queued(rollout_id, task=Task(rollout_id, task), **limits)


def pids_of(folder: Path) -> list[int]:
    wait_until((folder / "pids").exists)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def reward_of(server: StoreServer, rollout_id: str) -> float:
    (span,) = [s for s in server.store.spans(rollout_id) if s.scope == semconv.SCOPE_REWARD]
    return float(str(span.attributes[semconv.REWARD_VALUE]))


@contextmanager
def worker_process(server: StoreServer, *options: str) -> Generator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "agentlightning.runner", AGENT, "--server", server.url, *options],
        env={**os.environ, "AGENTLIGHTNING_KEY": server.key, "AGENTLIGHTNING_ADMIN_KEY": "secret"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_hung_agent_is_ended_with_all_it_started_and_its_rollout_retried(
    server: StoreServer, tmp_path: Path
) -> None:
    with Worker(server.client, AGENT, concurrency=2, heartbeat_s=0.2):
        server.store.enqueue([todo("hung", "hang_once", tmp_path, seconds=1.0), todo("beside", "random")])
        pids = pids_of(tmp_path)
        assert len(pids) == 3
        assert all(map(alive, pids))
        (ended, beside) = server.store.wait(["hung", "beside"], 60)
    assert not any(map(alive, pids))
    assert (ended.status, beside.status) == (RolloutStatus.SUCCEEDED, RolloutStatus.SUCCEEDED)
    attempts = server.store.attempts("hung")
    assert [a.status for a in attempts] == [AttemptStatus.TIMED_OUT, AttemptStatus.SUCCEEDED]
    assert attempts[0].error == "the agent was ended after 1 s"


def test_an_attempt_has_its_own_environment_group_randomness_and_a_shared_import(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTLIGHTNING_ADMIN_KEY", "secret")
    names = ["environment", "random", "random-2", "same_import", "same_import-2", "leave"]
    with Worker(server.client, AGENT, concurrency=3):
        server.store.enqueue([todo(name, name.split("-")[0]) for name in names[:-1]])
        ended = server.store.wait(names[:-1], 60)
    errors = [a.error for name in names[:-1] for a in server.store.attempts(name)]
    assert {r.status for r in ended} == {RolloutStatus.SUCCEEDED}, errors
    assert reward_of(server, "random") != reward_of(server, "random-2")
    assert reward_of(server, "same_import") == reward_of(server, "same_import-2")


def test_what_an_agent_leaves_behind_ends_with_it(server: StoreServer, tmp_path: Path) -> None:
    with Worker(server.client, AGENT):
        server.store.enqueue([todo("leaver", "leave_child", tmp_path)])
        assert server.store.wait(["leaver"], 30)[0].status is RolloutStatus.SUCCEEDED
        assert not any(map(alive, pids_of(tmp_path)))


@pytest.mark.parametrize(("what", "says"), [("os_exit", "exit code 4"), ("segfault", "killed by SIGSEGV")])
def test_an_agent_that_kills_its_process_fails_with_the_cause(
    server: StoreServer, what: str, says: str
) -> None:
    with Worker(server.client, AGENT):
        server.store.enqueue([todo(what, what, attempts=1), todo(f"{what}-next", "random")])
        assert len(server.store.wait([what, f"{what}-next"], 30)) == 2
    (attempt,) = server.store.attempts(what)
    assert says in (attempt.error or "")
    assert server.store.rollout(f"{what}-next").status is RolloutStatus.SUCCEEDED


def test_an_agent_whose_lease_is_lost_is_ended(server: StoreServer, tmp_path: Path) -> None:
    with Worker(server.client, AGENT, heartbeat_s=0.1) as worker:
        server.store.enqueue([todo("leased", "wait_for_file", tmp_path, attempts=1)])
        (pid,) = pids_of(tmp_path)
        sql = "UPDATE attempts SET lease_expires_ns = 1 WHERE id = 'leased-1'"
        with blocked(server.store):  # one commit, so that no heartbeat comes in between
            server.store._submit(lambda write: write.connection.exec_driver_sql(sql))  # pyright: ignore[reportPrivateUsage]
            server.store.submit_expire()
        server.store.wait(["leased"], 30)
        wait_until(lambda: not alive(pid))
        wait_until(lambda: not worker.active)
    assert server.store.attempts("leased")[0].status is AttemptStatus.LOST


def test_a_cancelled_rollout_frees_its_place(server: StoreServer, tmp_path: Path) -> None:
    with Worker(server.client, AGENT, heartbeat_s=0.1) as worker:
        server.store.enqueue([todo("to-cancel", "wait_for_file", tmp_path)])
        (pid,) = pids_of(tmp_path)
        server.store.cancel(["to-cancel"])
        wait_until(lambda: not worker.active)
        assert not alive(pid)


def test_attempts_outlive_a_killed_launcher_by_no_moment_and_the_next_ones_run(
    server: StoreServer, tmp_path: Path
) -> None:
    with Worker(server.client, AGENT):
        server.store.enqueue([todo("launched", "wait_for_file", tmp_path, attempts=2)])
        (pid,) = pids_of(tmp_path)
        launcher = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        (tmp_path / "pids").unlink()
        os.kill(launcher, signal.SIGKILL)
        wait_until(lambda: not alive(pid))
        pids_of(tmp_path)
        (tmp_path / "file").touch()
        assert server.store.wait(["launched"], 30)[0].status is RolloutStatus.SUCCEEDED
    assert "launches attempts died" in (server.store.attempts("launched")[0].error or "")


def test_a_worker_and_its_attempt_survive_a_restart_of_the_server(tmp_path: Path) -> None:
    settings = Settings(database=tmp_path / "s.db", admin_key="k")
    with Store(settings.database) as store, serve_in_thread(create_app(store, settings=settings)) as first:
        store.enqueue([todo("survivor", "wait_for_file", tmp_path, attempts=1)])
        client = LightningClient(first.url, "k")
        worker = Worker(client, AGENT, heartbeat_s=0.1).start()
        pids_of(tmp_path)
    (tmp_path / "file").touch()
    port = int(first.url.rsplit(":", 1)[1])
    with (
        Store(settings.database) as store,
        serve_in_thread(create_app(store, settings=settings), port=port),
        client,
    ):
        assert [r.status for r in store.wait(["survivor"], 60)] == [RolloutStatus.SUCCEEDED]
        worker.close()


# --- the worker as a process ---------------------------------------------------------------------


def test_a_killed_worker_leaves_no_process_and_its_rollout_to_others(
    server: StoreServer, tmp_path: Path
) -> None:
    with worker_process(server) as process:
        server.store.enqueue([todo("orphaned", "hang_once", tmp_path)])
        pids = pids_of(tmp_path)
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(alive, pids)))
    assert server.store.rollout("orphaned").status is RolloutStatus.RUNNING  # until its lease runs out
    server.store.cancel(["orphaned"])


def test_sigterm_lets_attempts_finish_and_claims_no_more(server: StoreServer, tmp_path: Path) -> None:
    with worker_process(server, "--grace", "30") as process:
        server.store.enqueue([todo("finishing", "wait_for_file", tmp_path)])
        pids_of(tmp_path)
        process.terminate()
        server.store.enqueue([todo("too-late", "random")])
        (tmp_path / "file").touch()
        assert process.wait(30) == 0
    assert server.store.rollout("finishing").status is RolloutStatus.SUCCEEDED
    assert server.store.rollout("too-late").status is RolloutStatus.QUEUED
    server.store.cancel(["too-late"])


@pytest.mark.parametrize("how", ["the grace is over", "a second signal"])
def test_attempts_that_do_not_finish_are_ended_and_given_back(
    server: StoreServer, tmp_path: Path, how: str
) -> None:
    rollout_id = f"given-back-{len(how)}"
    with worker_process(server, "--grace", "0.2" if "over" in how else "1000") as process:
        server.store.enqueue([todo(rollout_id, "hang_once", tmp_path, attempts=1)])
        pids = pids_of(tmp_path)
        process.send_signal(signal.SIGINT)
        if "second" in how:
            process.send_signal(signal.SIGTERM)  # not SIGINT again: the two might become one
        assert process.wait(30) == 0
    assert not any(map(alive, pids))
    assert server.store.rollout(rollout_id).status is RolloutStatus.QUEUED
    assert [a.status for a in server.store.attempts(rollout_id)] == [AttemptStatus.CANCELLED]
    server.store.cancel([rollout_id])


def test_threads_that_the_agents_import_started_do_not_outlive_the_worker(
    server: StoreServer, tmp_path: Path
) -> None:
    agent = tmp_path / "threaded_agent.py"
    agent.write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "def run(task): return 1.0\n"
    )
    began = time.monotonic()
    with Worker(server.client, f"{agent}:run"):
        server.store.enqueue([queued("threaded")])
        server.store.wait(["threaded"], 30)
    assert server.store.rollout("threaded").status is RolloutStatus.SUCCEEDED
    assert time.monotonic() - began < 25


def test_a_second_signal_ends_the_worker_also_when_the_server_is_gone(tmp_path: Path) -> None:
    with ExitStack() as serving:
        server = serving.enter_context(store_server(tmp_path))
        with worker_process(server) as process:
            server.store.enqueue([todo("unreported", "hang_once", tmp_path)])
            pids = pids_of(tmp_path)
            serving.close()
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0
    assert not any(map(alive, pids))


def test_the_command_says_what_it_lacks() -> None:
    command = [sys.executable, "-m", "agentlightning.runner"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AGENTLIGHTNING")}
    done = subprocess.run([*command, AGENT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "AGENTLIGHTNING_KEY" in done.stderr
    done = subprocess.run(
        [*command, "nothing:here", "--server", "http://127.0.0.1:9", "--key", "k"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "there is no module 'nothing'" in done.stderr
