"""Hosts with runners come and go, gracefully or not, while a run goes on: each rollout is done once."""

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
from urllib.parse import urlsplit

import pytest
from tests.support.namespaces import Host, available, host
from tests.support.server_process import server_process
from tests.support.stores import DATABASES, new_database, queued
from tests.support.waiting import wait_until

from agentlightning.types import AttemptStatus, Task
from agentlightning_server.auth import KeyScope
from agentlightning_server.store import Store

ROOT = Path(__file__).parents[2]
AGENT = "tests.reliability.test_runner_hosts:steady"
ROLLOUTS = 24


def steady(task: Any) -> float:
    """An agent that takes a moment."""
    time.sleep(task["seconds"])
    return 1.0


@contextmanager
def runner(place: Host, url: str, key: str, log: Path) -> Generator[subprocess.Popen[bytes]]:
    """A runner on a host, with all it started killed at the end."""
    own = f"http://{place.gateway}:{urlsplit(url).port}"
    command = place.command(sys.executable, "-m", "agentlightning.runner", AGENT, "--concurrency", "2")
    environment = {**os.environ, "AGENTLIGHTNING_URL": own, "AGENTLIGHTNING_KEY": key}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(not available(), reason="network namespaces cannot be made here")
@pytest.mark.parametrize("kind", DATABASES)
def test_hosts_come_and_go_while_a_run_goes_on(tmp_path: Path, kind: str) -> None:
    database = new_database(kind, tmp_path)
    with ExitStack() as stack:
        server = stack.enter_context(server_process(database, tmp_path, host="0.0.0.0"))
        store = stack.enter_context(Store(database))
        key = store.mint_key(KeyScope.RUNNER)
        ids = [f"r{i}" for i in range(ROLLOUTS)]
        store.enqueue([queued(i, task=Task(i, {"seconds": 0.2}), attempts=3) for i in ids])
        log = tmp_path / "runners.log"

        def join() -> tuple[Host, subprocess.Popen[bytes]]:
            place = stack.enter_context(host())
            return place, stack.enter_context(runner(place, server.url, key, log))

        def done() -> int:
            return store.counts().get("succeeded", 0)

        def running() -> list[str]:
            return [a.worker_id for i in ids for a in store.attempts(i) if a.status is AttemptStatus.RUNNING]

        (_, leaving), (cut_place, _) = join(), join()
        wait_until(lambda: done() >= 4 and len(set(running())) == 2, 60)
        cut_place.unplug()  # it works on, and its reports never come
        join()
        leaving.send_signal(signal.SIGTERM)
        assert leaving.wait(60) == 0, log.read_text()
        wait_until(lambda: done() >= ROLLOUTS - 2, 60)
        # The leases of the host that was cut off would run out in half a minute.
        sql = "UPDATE attempts SET lease_expires_ns = 1 WHERE status = 'running'"
        store._submit(lambda write: write.connection.exec_driver_sql(sql)).result()  # pyright: ignore[reportPrivateUsage]
        wait_until(lambda: done() == ROLLOUTS, 60)
        attempts = [attempt for i in ids for attempt in store.attempts(i)]
        succeeded = [a for a in attempts if a.status is AttemptStatus.SUCCEEDED]
        assert sorted(a.rollout_id for a in succeeded) == sorted(ids)
        assert len({a.worker_id for a in succeeded}) >= 2
        assert AttemptStatus.LOST in {a.status for a in attempts}
