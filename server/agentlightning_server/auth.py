"""Who is asking, and may they: every path is guarded unless it is listed as open.

Not here: making and storing keys (`store.keys`). Invariants: a route that nobody thought about is guarded; a
key is compared as a hash, in constant time, and is never logged; a request sees one project, its key's. Only
the server's own key, the one in its settings, may name another project, in a header.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Mapping

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from agentlightning.errors import AgentLightningError, InvalidInput, PermissionDenied

from .http_errors import error_response
from .store import DEFAULT_PROJECT, Principal, Store
from .store import Scope as KeyScope
from .store.keys import hash_key

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
PROJECT_HEADER = b"x-agentlightning-project"
_PROJECT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

__all__ = ["KeyScope", "Principal", "check_project", "guard_attempt", "guard_model", "principal", "require"]


class AuthMiddleware:
    """Puts the `Principal` of each request where `principal` finds it; answers 401 itself."""

    def __init__(self, app: ASGIApp, store: Store, admin_key: str, open_paths: frozenset[str]) -> None:
        self._app = app
        self._store = store
        self._admin_hash = hash_key(admin_key)
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        try:
            owner = await self._authenticate(dict(scope["headers"]))
        except AgentLightningError as error:
            await error_response(error)(scope, receive, send)
            return
        scope["agentlightning.principal"] = owner
        await self._app(scope, receive, send)

    async def _authenticate(self, headers: Mapping[bytes, bytes]) -> Principal:
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise PermissionDenied("no key: send the header `Authorization: Bearer KEY`")
        named = headers.get(PROJECT_HEADER)
        wanted = None if named is None else named.decode("latin-1")
        if hmac.compare_digest(hash_key(key), self._admin_hash):
            return Principal(KeyScope.ADMIN, DEFAULT_PROJECT if wanted is None else check_project(wanted))
        owner = self._store.cached_principal(key) or await asyncio.to_thread(self._store.principal, key)
        if owner is None:
            raise PermissionDenied(
                "unknown key: it is misspelt, of another server, revoked, expired, or of an ended attempt"
            )
        if wanted not in (None, owner.project):
            raise PermissionDenied("this key belongs to another project", authenticated=True)
        return owner


def check_project(name: str) -> str:
    """A project's name. Raises InvalidInput."""
    if not _PROJECT.fullmatch(name):
        raise InvalidInput(
            f"{name!r:.80} cannot be a project: use 1 to 63 small letters, digits and any of ._- , starting "
            "with a letter or digit"
        )
    return name


def principal(request: HTTPConnection) -> Principal:
    """Whose key the request carries. Raises PermissionDenied on an open path, where nobody was asked."""
    owner = request.scope.get("agentlightning.principal")
    if not isinstance(owner, Principal):
        raise PermissionDenied("no key: send the header `Authorization: Bearer KEY`")
    return owner


def require(request: HTTPConnection, *scopes: KeyScope) -> Principal:
    """The principal, who must be an admin or of one of the scopes. Raises PermissionDenied."""
    owner = principal(request)
    if owner.scope is not KeyScope.ADMIN and owner.scope not in scopes:
        needed = " or ".join(str(scope) for scope in (KeyScope.ADMIN, *scopes))
        raise PermissionDenied(
            f"a key of scope {owner.scope} may not do this: use one of scope {needed}", authenticated=True
        )
    return owner


def guard_model(owner: Principal) -> None:
    """All but those who only give rewards may call the model and write spans. Raises PermissionDenied."""
    if owner.scope is KeyScope.REPORTER:
        raise PermissionDenied("a key of scope reporter may only give rewards", authenticated=True)


def guard_attempt(owner: Principal, rollout_id: str | None, attempt_id: str | None) -> None:
    """An attempt's key speaks only for its own attempt; None is no claim. Raises PermissionDenied."""
    if owner.scope is not KeyScope.ATTEMPT:
        return
    if rollout_id not in (None, owner.rollout_id) or attempt_id not in (None, owner.attempt_id):
        raise PermissionDenied(
            f"this key belongs to attempt {owner.attempt_id} and may not speak for another",
            authenticated=True,
        )
