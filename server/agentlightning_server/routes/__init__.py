"""The HTTP routes over the store; the gateway's are its own."""

from __future__ import annotations

from starlette.routing import Route

from ..settings import Settings
from ..store import Store
from .keys import Keys
from .polling import Polling
from .rollouts import Rollouts
from .traces import Ingest
from .work import Work


def store_routes(store: Store, settings: Settings, polling: Polling) -> list[Route]:
    """Spans, rollouts, work and keys."""
    limit = settings.max_body_bytes
    return [
        *Ingest(store, limit).routes(),
        *Rollouts(store, polling, limit).routes(),
        *Keys(store, limit).routes(),
        *Work(store, polling, settings.model, limit).routes(),
    ]
