"""Long polls that end early when the server shuts down."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

MAX_POLL_S = 60.0  # proxies tend to cut longer ones


class Polling:
    """Waits on the store's futures, all of them released by `close`."""

    def __init__(self) -> None:
        self._closing = asyncio.Event()

    @property
    def closing(self) -> bool:
        """Whether the server is shutting down."""
        return self._closing.is_set()

    def close(self) -> None:
        """End all waits, now and later. Call it in the loop."""
        self._closing.set()

    async def wait(self, future: Future[None], timeout_s: float) -> bool:
        """True when the future completed in time, False at the timeout or at shutdown."""
        done = asyncio.wrap_future(future)
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait(
                {done, closing},
                timeout=min(timeout_s, MAX_POLL_S),
                return_when=asyncio.FIRST_COMPLETED,
            )
            return done.done()
        finally:
            closing.cancel()
            done.cancel()
