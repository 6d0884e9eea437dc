"""Where commands read stored rollouts from: the folder of a run, or a live server."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentlightning.bridge import RolloutService
from agentlightning.client import LightningClient
from agentlightning.errors import InvalidInput
from agentlightning.types import Rollout
from agentlightning_server.store import RolloutFilter, Store


@dataclass(frozen=True, slots=True)
class Source:
    """Rollouts, page by page, and the service that has the rest of them."""

    page: Callable[[str | None], Sequence[Rollout]]
    service: RolloutService

    def rollouts(self) -> Iterator[Rollout]:
        """All of them, oldest first."""
        last: str | None = None
        while found := self.page(last):
            yield from found
            last = found[-1].id


@contextmanager
def stored(run_folder: Path | None, server: str | None, key: str | None) -> Generator[Source]:
    """Open the one that was named. Raises InvalidInput when none was, or the folder holds no run."""
    if server is not None:
        with LightningClient(server, key or "") as client:
            yield Source(lambda after: client.rollouts(after=after), client)
        return
    if run_folder is None:
        raise InvalidInput("name the folder of a run, or a live server with --server")
    database = run_folder / "store.db"
    if not database.exists():
        raise InvalidInput(f"{run_folder} holds no run: there is no store.db in it")
    with Store(database) as store:
        yield Source(lambda after: store.rollouts(RolloutFilter(after=after)), store)
