"""One look at every request: counted, timed, logged at level info, and traced when asked for.

Seen are method, route, status and time; not path, query, headers or body, which may hold what is nobody's
business. Invariant: a request that fails in here fails as it would have without.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.trace import SpanKind, StatusCode, Tracer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .logs import FIELDS
from .metrics import Metrics

UNKNOWN_ROUTE = "unknown"
logger = logging.getLogger(__name__)


class Observing:
    """The outermost middleware. `routes` are the path templates of endpoints."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, routes: Mapping[Any, str], tracer: Tracer | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        began, began_ns = time.perf_counter(), time.time_ns()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight += 1
        try:
            await self._app(scope, receive, noting)
        finally:
            self._metrics.in_flight -= 1
            self._seen(scope, status, time.perf_counter() - began, began_ns)

    def _seen(self, scope: Scope, status: int, seconds: float, began_ns: int) -> None:
        route = self._routes.get(scope.get("endpoint"), UNKNOWN_ROUTE)
        self._metrics.observe(scope["method"], route, status, seconds)
        if logger.isEnabledFor(logging.INFO):
            logger.info("request", extra={FIELDS: _fields(scope, route, status, seconds)})
        if self._tracer is not None:
            self._trace(self._tracer, scope["method"], route, status, began_ns)

    def _trace(self, tracer: Tracer, method: str, route: str, status: int, began_ns: int) -> None:
        attributes = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        span = tracer.start_span(
            f"{method} {route}", kind=SpanKind.SERVER, attributes=attributes, start_time=began_ns
        )
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end()


def _fields(scope: Scope, route: str, status: int, seconds: float) -> dict[str, Any]:
    owner = scope.get("agentlightning.principal")
    return {
        "method": scope["method"],
        "route": route,
        "status": status,
        "ms": round(1000 * seconds, 2),
        **({} if owner is None else {"scope": str(owner.scope), "project": owner.project}),
    }
