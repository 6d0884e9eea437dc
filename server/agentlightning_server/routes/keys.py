"""REST for keys, for admins of their project.

POST /api/keys    GET /api/keys    DELETE /api/keys/{id}

A key is in the answer that makes it and nowhere else.
"""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentlightning.errors import InvalidInput
from agentlightning.wire import Reader

from ..auth import KeyScope, require
from ..http_errors import json_response
from ..store import KeyInfo, Store
from .body import read_json

MAX_NAME = 100
MAX_LIFE_S = 10 * 365 * 86_400.0


class Keys:
    """The key resource over one store."""

    def __init__(self, store: Store, max_body_bytes: int) -> None:
        self._store = store
        self._limit = max_body_bytes

    def routes(self) -> list[Route]:
        """All paths of the resource."""
        return [
            Route("/api/keys", self.mint, methods=["POST"]),
            Route("/api/keys", self.list, methods=["GET"]),
            Route("/api/keys/{id}", self.revoke, methods=["DELETE"]),
        ]

    async def mint(self, request: Request) -> Response:
        """201 with a new key of any scope but an attempt's; it is shown only here."""
        store = self._store.of(require(request).project)
        read = Reader(await read_json(request, self._limit), "body")
        scope, name = read.member("scope", KeyScope), read.text("name", "")
        if scope is KeyScope.ATTEMPT:
            raise InvalidInput("keys of attempts are made by claiming; ask for another scope")
        if len(name) > MAX_NAME:
            raise InvalidInput(f"body.name must have at most {MAX_NAME} characters")
        life_s = read.number("expires_in_s", 0.0, 0.0, MAX_LIFE_S)
        expires_ns = time.time_ns() + int(life_s * 1e9) if life_s else None
        key = await asyncio.to_thread(store.mint_key, scope, name, expires_ns)
        return json_response({"key": key, "scope": str(scope), "project": store.project}, 201)

    async def list(self, request: Request) -> Response:
        """The project's keys, without the keys themselves."""
        store = self._store.of(require(request).project)
        found = await asyncio.to_thread(store.keys)
        return json_response({"keys": [_to_json(key) for key in found]})

    async def revoke(self, request: Request) -> Response:
        """The key no longer works once this is answered."""
        store = self._store.of(require(request).project)
        await asyncio.to_thread(store.revoke_key, request.path_params["id"])
        return json_response({})


def _to_json(key: KeyInfo) -> dict[str, object]:
    return {
        "id": key.id,
        "name": key.name,
        "scope": str(key.scope),
        "created_ns": key.created_ns,
        "expires_ns": key.expires_ns,
    }
