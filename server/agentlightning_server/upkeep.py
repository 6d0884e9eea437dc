"""What a running server does by itself: ends attempts whose lease ran out, and lets old rollouts go.

Several servers of one database may all do it: each step is one write, and finds nothing where another was
first. Invariant: a step that fails is logged and tried again; it never ends the server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from agentlightning.errors import StoreError, Unavailable

from .retention import Retention
from .store import Store

EXPIRE_EVERY_S = 1.0
DELETE_EVERY_S = 60.0
logger = logging.getLogger(__name__)


class Upkeep:
    """The tasks over one store."""

    def __init__(self, store: Store, retention: Retention) -> None:
        self._store = store
        self._retention = retention

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Does its work while the block runs."""
        tasks = [asyncio.create_task(_for_ever(self._expire, EXPIRE_EVERY_S, "leases were not checked"))]
        if self._retention:
            text = "old rollouts were not deleted"
            tasks.append(asyncio.create_task(_for_ever(self._delete_old, DELETE_EVERY_S, text)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    async def _expire(self) -> None:
        await asyncio.wrap_future(self._store.submit_expire())

    async def _delete_old(self) -> None:
        deleted = await asyncio.to_thread(self._store.delete_old, self._retention)
        if deleted:
            logger.info("deleted %d old rollouts", deleted)


async def _for_ever(step: Callable[[], Awaitable[None]], every_s: float, failed: str) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            await step()
        except (StoreError, Unavailable) as error:
            logger.warning("%s: %s", failed, error)
