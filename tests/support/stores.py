"""A real server over a real store, without an engine, and the spans and rollouts to put into it."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentlightning.client import LightningClient
from agentlightning.types import Limits, Rollout, Span, SpanKind, Task
from agentlightning_server.app import create_app, serve_in_thread
from agentlightning_server.settings import Settings
from agentlightning_server.store import Store

SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class StoreServer:
    url: str
    key: str
    store: Store
    client: LightningClient

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


DATABASES = ("sqlite", "postgresql")


def new_database(kind: str, folder: Path) -> Path | str:
    """Where a new database of the kind is to be opened."""
    if kind == "sqlite":
        return folder / "store.db"
    from tests.support import postgres  # not everything that starts a server has PostgreSQL at hand

    return postgres.new_database()


@contextmanager
def store_server(
    folder: Path, *, database: Path | str | None = None, max_pending: int = 4096, **settings: Any
) -> Generator[StoreServer]:
    """A server on a free port, over SQLite unless told otherwise; everything is closed at the end."""
    where = folder / "store.db" if database is None else database
    chosen = Settings(port=0, database=where, data=folder, **settings).with_admin_key()
    with (
        Store(chosen.database, max_pending=max_pending) as store,
        serve_in_thread(create_app(store, settings=chosen)) as running,
    ):
        key = chosen.admin_key or ""
        with LightningClient(running.url, key) as client:
            yield StoreServer(running.url, key, store, client)


@contextmanager
def blocked(store: Store) -> Generator[None]:
    """Nothing is written until the block ends; writes asked for meanwhile go into one commit."""
    release, entered = threading.Event(), threading.Event()

    def hold(_write: object) -> None:
        entered.set()
        release.wait()

    store._submit(hold)  # pyright: ignore[reportPrivateUsage]
    entered.wait()
    try:
        yield
    finally:
        release.set()


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_ns = 1_000 * SECOND

    def __call__(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += int(seconds * SECOND)


def queued(rollout_id: str, *, attempts: int = 3, seconds: float = 600.0, **changes: Any) -> Rollout:
    values: dict[str, Any] = {
        "id": rollout_id,
        "task": Task(f"task of {rollout_id}", {"question": rollout_id}),
        "group_id": "group",
        "limits": Limits(seconds, attempts),
    }
    return Rollout(**{**values, **changes})


def plain_span(number: int, rollout_id: str | None = None, **changes: Any) -> Span:
    """A root span; the number makes its ids."""
    values: dict[str, Any] = {
        "trace_id": f"{number + 1:032x}",
        "span_id": f"{number + 1:016x}",
        "parent_id": None,
        "name": "work",
        "kind": SpanKind.INTERNAL,
        "start_ns": 10 + number,
        "end_ns": 20 + number,
        "rollout_id": rollout_id,
    }
    return Span(**{**values, **changes})
