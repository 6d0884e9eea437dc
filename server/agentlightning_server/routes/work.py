"""REST for workers: claim rollouts, keep the lease, report the end.

POST /api/claims    POST /api/attempts/{id}/heartbeat    POST /api/attempts/{id}/finish
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentlightning.errors import InvalidInput, Unavailable
from agentlightning.types import AttemptStatus, Claim
from agentlightning.wire import Reader, claim_to_json, reward_from_json

from ..auth import KeyScope, require
from ..http_errors import json_response
from ..store import Store
from .body import read_json
from .polling import MAX_POLL_S, Polling

MAX_CLAIMS = 256  # at once
MIN_RETRY_WAIT_S = 0.01


class Work:
    """What a worker calls, over one store. `model` is the policy's name that claims carry."""

    def __init__(self, store: Store, polling: Polling, model: str, max_body_bytes: int) -> None:
        self._store = store
        self._polling = polling
        self._model = model
        self._limit = max_body_bytes

    def routes(self) -> list[Route]:
        """All paths."""
        return [
            Route("/api/claims", self.claim, methods=["POST"]),
            Route("/api/attempts/{id}/heartbeat", self.heartbeat, methods=["POST"]),
            Route("/api/attempts/{id}/finish", self.finish, methods=["POST"]),
        ]

    async def claim(self, request: Request) -> Response:
        """Long poll: up to `max` rollouts, as soon as there is one or none at the timeout."""
        store = self._store.of(require(request, KeyScope.RUNNER).project)
        read = Reader(await read_json(request, self._limit), "body")
        worker_id, limit = _worker(read), read.integer("max", 1, low=1, high=MAX_CLAIMS)
        wait_s = read.number("wait_s", 0.0, 0.0, 1e9)
        claims = await self._claim(request, store, worker_id, limit, wait_s)
        return json_response({"claims": [claim_to_json(claim) for claim in claims]})

    async def _claim(
        self, request: Request, store: Store, worker_id: str, limit: int, wait_s: float
    ) -> Sequence[Claim]:
        deadline = time.monotonic() + min(wait_s, MAX_POLL_S)
        while True:
            if self._polling.closing:
                raise Unavailable("the server is shutting down")
            with store.waiting_for_work() as work:
                claims = await asyncio.wrap_future(store.submit_claim(worker_id, limit, self._model))
                left = deadline - time.monotonic()
                if claims:
                    return await _handed_over(request, store, worker_id, claims)
                if left <= 0:
                    return ()
                retry_s = await asyncio.to_thread(store.seconds_to_retry)
                pause = left if retry_s is None else min(left, max(MIN_RETRY_WAIT_S, retry_s))
                await self._polling.wait(work, pause)
            if await request.is_disconnected():
                return ()

    async def heartbeat(self, request: Request) -> Response:
        """Renew the lease; tells whether to give up."""
        store = self._store.of(require(request, KeyScope.RUNNER).project)
        worker_id = _worker(Reader(await read_json(request, self._limit), "body"))
        cancel = await asyncio.wrap_future(store.submit_heartbeat(request.path_params["id"], worker_id))
        return json_response({"cancel": cancel})

    async def finish(self, request: Request) -> Response:
        """End the attempt with its rewards, all in one commit."""
        store = self._store.of(require(request, KeyScope.RUNNER).project)
        read = Reader(await read_json(request, self._limit), "body")
        rewards = [reward_from_json(item, f"rewards[{i}]") for i, item in enumerate(read.items("rewards"))]
        status = read.member("status", AttemptStatus)
        if status is AttemptStatus.RUNNING:
            raise InvalidInput("an attempt cannot finish as running")
        await asyncio.wrap_future(
            store.submit_finish(
                request.path_params["id"], _worker(read), status, read.optional_text("error"), rewards
            )
        )
        return json_response({})


async def _handed_over(
    request: Request, store: Store, worker_id: str, claims: Sequence[Claim]
) -> Sequence[Claim]:
    """The claims, unless the worker has hung up: then they go back instead of waiting for their lease."""
    if not await request.is_disconnected():
        return claims
    for claim in claims:
        await asyncio.wrap_future(
            store.submit_finish(
                claim.attempt.id, worker_id, AttemptStatus.CANCELLED, "the worker hung up while claiming"
            )
        )
    return ()


def _worker(read: Reader) -> str:
    worker_id = read.text("worker_id")
    if not 0 < len(worker_id) <= 200:
        raise InvalidInput("body.worker_id must have 1 to 200 characters")
    return worker_id
