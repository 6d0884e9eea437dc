"""A server in a process of its own, for tests that kill it, and for several servers of one database."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

KEY = "the admin's key"
_SERVER = """
import json, sys
from pathlib import Path
from agentlightning_server.app import bind, create_app, serve, url_of
from agentlightning_server.observing import configure_logs
from agentlightning_server.settings import Settings
from agentlightning_server.store import Store, is_url

given = json.loads(sys.argv[1])
where = given.pop("database")
store_options = given.pop("store")
settings = Settings(database=where if is_url(where) else Path(where), data=Path(given.pop("data")), **given)
configure_logs(settings.log_format, settings.log_level)
with Store(settings.database, durability=settings.durability, **store_options) as store:
    sock = bind(settings.host, 0)
    print(url_of(sock), flush=True)
    serve(create_app(store, settings=settings), sock)
"""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server, ready to be asked."""

    url: str
    process: subprocess.Popen[str]
    log: Path
    headers: dict[str, str]

    def client(self, **options: Any) -> httpx.Client:
        """A client with the admin's key."""
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=30, **options)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed or finished."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """SIGTERM; the exit code."""
        os.kill(self.process.pid, signal.SIGTERM)
        return self.process.wait(20)

    @property
    def resident_kib(self) -> int:
        """Memory that it holds now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@contextmanager
def server_process(
    database: Path | str, folder: Path, *, store: dict[str, Any] | None = None, **settings: Any
) -> Generator[ServerProcess]:
    """Start one; it is killed at the end if it is still there."""
    given = {"database": str(database), "data": str(folder), "admin_key": KEY, "store": store or {}}
    log = folder / f"server-{os.urandom(4).hex()}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, json.dumps({**given, **settings})],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url, log.read_text()
        yield ServerProcess(url, process, log, {"Authorization": f"Bearer {KEY}"})
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
