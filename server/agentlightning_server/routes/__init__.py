"""The HTTP routes over the store; the gateway's are its own."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentlightning.errors import Unavailable

from ..http_errors import json_response
from ..settings import Settings
from ..store import Store
from .polling import Polling
from .rollouts import Rollouts
from .traces import Ingest
from .work import Work


def store_routes(store: Store, settings: Settings, polling: Polling) -> list[Route]:
    """Every route but the gateway's."""

    async def healthz(_request: Request) -> Response:
        return json_response({"status": "ok"})

    async def readyz(_request: Request) -> Response:
        if polling.closing or not await asyncio.to_thread(lambda: store.healthy):
            raise Unavailable("not ready: the server is shutting down or its database cannot be used")
        return json_response({"status": "ready"})

    limit = settings.max_body_bytes
    return [
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
        *Ingest(store, limit).routes(),
        *Rollouts(store, polling, limit).routes(),
        *Work(store, polling, settings.model, limit).routes(),
    ]
