"""REST for rollouts: enqueue, look at, wait for, cancel, reward.

    POST /api/rollouts                 GET /api/rollouts            GET /api/rollouts/{id}
    POST /api/rollouts/wait            POST /api/rollouts/{id}/cancel
    POST /api/rollouts/{id}/rewards    GET /api/rollouts/{id}/spans

Not here: what workers call (`work`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentlightning.errors import InvalidInput
from agentlightning.otlp import span_to_json
from agentlightning.types import Mode, RolloutStatus
from agentlightning.wire import (
    Reader,
    attempt_to_json,
    reward_from_json,
    rollout_from_json,
    rollout_to_json,
)

from ..auth import KeyScope, require
from ..http_errors import json_response
from ..store import RolloutFilter, Store
from .body import read_json
from .polling import Polling

MAX_PAGE = 1000


class Rollouts:
    """The rollout resource over one store."""

    def __init__(self, store: Store, polling: Polling, max_body_bytes: int) -> None:
        self._store = store
        self._polling = polling
        self._limit = max_body_bytes

    def routes(self) -> list[Route]:
        """All paths of the resource."""
        return [
            Route("/api/rollouts", self.enqueue, methods=["POST"]),
            Route("/api/rollouts", self.list, methods=["GET"]),
            Route("/api/rollouts/wait", self.wait, methods=["POST"]),
            Route("/api/rollouts/{id}", self.get, methods=["GET"]),
            Route("/api/rollouts/{id}/cancel", self.cancel, methods=["POST"]),
            Route("/api/rollouts/{id}/rewards", self.reward, methods=["POST"]),
            Route("/api/rollouts/{id}/spans", self.spans, methods=["GET"]),
        ]

    async def enqueue(self, request: Request) -> Response:
        """201 with the number queued; ids that exist are left as they are."""
        store = self._store_of(request, KeyScope.TRAINER)
        items = Reader(await read_json(request, self._limit), "body").items("rollouts")
        rollouts = [rollout_from_json(item, f"rollouts[{i}]") for i, item in enumerate(items)]
        if not rollouts:
            raise InvalidInput('nothing to enqueue: send {"rollouts": [...]} with at least one')
        await asyncio.wrap_future(store.submit_enqueue(rollouts))
        return json_response({"count": len(rollouts)}, 201)

    async def list(self, request: Request) -> Response:
        """A page, oldest first; the next one starts `after` the last id."""
        store = self._store_of(request, KeyScope.TRAINER)
        page = await asyncio.to_thread(store.rollouts, _filter(dict(request.query_params)))
        return json_response({"rollouts": [rollout_to_json(rollout) for rollout in page]})

    async def get(self, request: Request) -> Response:
        """One rollout with its attempts."""
        store = self._store_of(request, KeyScope.TRAINER)
        rollout_id = request.path_params["id"]
        rollout = await asyncio.to_thread(store.rollout, rollout_id)
        attempts = await asyncio.to_thread(store.attempts, rollout_id)
        return json_response(
            {"rollout": rollout_to_json(rollout), "attempts": [attempt_to_json(one) for one in attempts]}
        )

    async def wait(self, request: Request) -> Response:
        """Long poll: those that are final, as soon as all are or at the timeout."""
        store = self._store_of(request, KeyScope.TRAINER)
        read = Reader(await read_json(request, self._limit), "body")
        ids = read.texts("ids")
        timeout_s = read.number("timeout_s", 30.0, 0.0, 1e9)
        final = await self._wait(store, ids, timeout_s)
        return json_response({"rollouts": [rollout_to_json(rollout) for rollout in final]})

    async def _wait(self, store: Store, ids: Sequence[str], timeout_s: float) -> Sequence[Any]:
        final = await asyncio.to_thread(store.final, ids)
        if timeout_s and len(final) < len(set(ids)):
            # Subscribing reads the database, which may take longer than a loop should wait.
            waiting = store.waiting_for_final(ids)
            done = await asyncio.to_thread(waiting.__enter__)
            try:
                await self._polling.wait(done, timeout_s)
            finally:
                waiting.__exit__(None, None, None)
            final = await asyncio.to_thread(store.final, ids)
        return final

    async def cancel(self, request: Request) -> Response:
        """End the rollout and its running attempt."""
        store = self._store_of(request, KeyScope.TRAINER)
        await asyncio.wrap_future(store.submit_cancel([request.path_params["id"]]))
        return json_response({})

    async def reward(self, request: Request) -> Response:
        """201 with the attempt that got the reward."""
        store = self._store_of(request, KeyScope.TRAINER, KeyScope.REPORTER)
        body = await read_json(request, self._limit)
        reward = reward_from_json(body, "body")
        wanted = Reader(body, "body").optional_text("attempt_id")
        attempt_id = await asyncio.wrap_future(store.submit_reward(request.path_params["id"], reward, wanted))
        return json_response({"attempt_id": attempt_id}, 201)

    async def spans(self, request: Request) -> Response:
        """Spans of an attempt, by default of the one that decides, in OTLP/JSON's shape."""
        store = self._store_of(request, KeyScope.TRAINER)
        rollout_id, attempt_id = request.path_params["id"], request.query_params.get("attempt_id")
        return await asyncio.to_thread(_spans, store, rollout_id, attempt_id)

    def _store_of(self, request: Request, *scopes: KeyScope) -> Store:
        """The store as the request's key may see it. Raises PermissionDenied."""
        return self._store.of(require(request, *scopes).project)


def _spans(store: Store, rollout_id: str, attempt_id: str | None) -> Response:
    return json_response({"spans": [span_to_json(span) for span in store.spans(rollout_id, attempt_id)]})


def _filter(query: dict[str, Any]) -> RolloutFilter:
    if "limit" in query:
        text = query["limit"]
        query["limit"] = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text
    read = Reader(query, "query")
    return RolloutFilter(
        run_id=read.optional_text("run_id"),
        status=read.member("status", RolloutStatus) if "status" in query else None,
        mode=read.member("mode", Mode) if "mode" in query else None,
        limit=read.integer("limit", 100, low=1, high=MAX_PAGE),
        after=read.optional_text("after"),
    )
