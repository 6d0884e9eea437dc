"""Routes for whoever operates the server: health, readiness, metrics, and the description of the API.

    GET /healthz    GET /readyz    GET /metrics    GET /openapi.json

Health and readiness are open and say nothing else. Not here: what is measured (`observing`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agentlightning.errors import Unavailable

from ..auth import KeyScope, principal, require
from ..http_errors import json_response
from ..observing import Metrics
from ..observing.metrics import CONTENT_TYPE
from ..store import Store
from .openapi import DESCRIPTION
from .polling import Polling


def operations_routes(store: Store, polling: Polling, metrics: Metrics) -> list[Route]:
    """All of them."""

    async def healthz(_request: Request) -> Response:
        return json_response({"status": "ok"})

    async def readyz(_request: Request) -> Response:
        if polling.closing or not await asyncio.to_thread(lambda: store.healthy):
            raise Unavailable("not ready: the server is shutting down or its database cannot be used")
        return json_response({"status": "ready"})

    async def show_metrics(request: Request) -> Response:
        require(request, KeyScope.TRAINER)
        return Response(await asyncio.to_thread(metrics.render), headers={"content-type": CONTENT_TYPE})

    async def describe(request: Request) -> Response:
        principal(request)
        return json_response(DESCRIPTION)

    return [
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
        Route("/openapi.json", describe, methods=["GET"]),
    ]


def templates_of(routes: Sequence[BaseRoute]) -> dict[Any, str]:
    """The path of each endpoint; the shortest, where it has several."""
    found: dict[Any, str] = {}
    for route in routes:
        if isinstance(route, Route):
            known = found.get(route.endpoint)
            if known is None or len(route.path) < len(known):
                found[route.endpoint] = route.path
    return found
