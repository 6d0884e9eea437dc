from __future__ import annotations

import logging
import stat
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tests.support.stores import StoreServer, queued, store_server

from agentlightning.errors import InvalidInput
from agentlightning.types import AttemptStatus
from agentlightning_server.app import create_app, serve_in_thread
from agentlightning_server.auth import KeyScope, principal
from agentlightning_server.settings import Settings
from agentlightning_server.store import Store

# Every route with a body that gets past reading, and who may call it besides an admin.
ROUTES: list[tuple[str, str, set[str]]] = [
    ("POST", "/v1/traces", {"trainer", "runner", "attempt"}),
    ("POST", "/rollouts/own/attempts/own-1/v1/traces", {"trainer", "runner", "attempt"}),
    ("POST", "/api/rollouts", {"trainer"}),
    ("GET", "/api/rollouts", {"trainer"}),
    ("POST", "/api/rollouts/wait", {"trainer"}),
    ("GET", "/api/rollouts/own", {"trainer"}),
    ("GET", "/api/rollouts/own/spans", {"trainer"}),
    ("POST", "/api/rollouts/spare/cancel", {"trainer"}),
    ("POST", "/api/rollouts/own/rewards", {"trainer", "reporter"}),
    ("POST", "/api/claims", {"runner"}),
    ("POST", "/api/attempts/own-1/heartbeat", {"runner"}),
    ("POST", "/api/attempts/gone-1/finish", {"runner"}),
    ("POST", "/api/keys", set()),
    ("GET", "/api/keys", set()),
    ("DELETE", "/api/keys/none", set()),
    ("GET", "/metrics", {"trainer"}),
    ("GET", "/openapi.json", {"trainer", "runner", "reporter", "attempt"}),
]
SCOPES = ("admin", "trainer", "runner", "reporter", "attempt")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[StoreServer]:
    with store_server(tmp_path_factory.mktemp("auth"), admin_key="the admin's key") as running:
        yield running


@pytest.fixture(scope="module")
def keys(server: StoreServer) -> dict[str, str]:
    server.store.enqueue([queued("own"), queued("spare"), queued("ended")])
    claims = {claim.rollout.id: claim for claim in server.store.claim("w", 3)}
    server.store.finish("ended-1", "w", AttemptStatus.SUCCEEDED)
    return {
        "admin": server.key,
        **{name: server.store.mint_key(KeyScope(name)) for name in ("trainer", "runner", "reporter")},
        "attempt": claims["own"].key,
        "ended": claims["ended"].key,
        "wrong": "agl-admin-guessed",
    }


def ask(server: StoreServer, method: str, path: str, key: str | None) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    if method != "POST":
        return httpx.request(method, server.url + path, headers=headers)
    return httpx.post(server.url + path, json={}, headers=headers)


@pytest.mark.parametrize(("method", "path", "allowed"), ROUTES)
def test_each_route_serves_the_scopes_it_should(
    server: StoreServer, keys: dict[str, str], method: str, path: str, allowed: set[str]
) -> None:
    for name in SCOPES:
        status = ask(server, method, path, keys[name]).status_code
        if name in allowed or name == "admin":
            assert status not in (401, 403), name
        else:
            assert status == 403, name
    for name in ("ended", "wrong"):
        assert ask(server, method, path, keys[name]).status_code == 401, name
    refused = ask(server, method, path, None)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"


def test_paths_that_nobody_thought_of_are_guarded(server: StoreServer) -> None:
    for path in ("/", "/api", "/metrics", "/healthz/", "/%68ealthz2", "/v1/models"):
        assert httpx.get(server.url + path).status_code == 401


@pytest.mark.parametrize("header", ["", "Bearer", "Basic dTpw", "the admin's key", "Bearer é"])
def test_headers_that_are_no_bearer_key_are_401(server: StoreServer, header: str) -> None:
    answer = httpx.get(server.url + "/api/rollouts", headers=[(b"Authorization", header.encode())])
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_an_attempts_key_does_not_open_another_attempts_url(
    server: StoreServer, keys: dict[str, str]
) -> None:
    answer = ask(server, "POST", "/rollouts/spare/attempts/spare-1/v1/traces", keys["attempt"])
    assert answer.status_code == 403


def test_an_attempts_key_dies_with_the_attempt(server: StoreServer) -> None:
    server.store.enqueue([queued("dying")])
    (claim,) = server.store.claim("w")
    assert ask(server, "POST", "/v1/traces", claim.key).status_code == 200
    server.store.finish(claim.attempt.id, "w", AttemptStatus.SUCCEEDED)
    assert ask(server, "POST", "/v1/traces", claim.key).status_code == 401


def test_a_minted_key_works_and_only_its_hash_is_stored(server: StoreServer) -> None:
    key = server.client.mint_key("runner")
    assert ask(server, "POST", "/api/claims", key).status_code == 400
    assert server.store.path is not None
    files = [path for path in server.store.path.parent.iterdir() if path.name.startswith("store.db")]
    assert all(key.encode() not in path.read_bytes() for path in files)


def test_keys_are_never_logged(
    server: StoreServer, keys: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        for key in keys.values():
            ask(server, "POST", "/api/claims", key)
            ask(server, "GET", "/api/rollouts/none", key)
    assert not any(key in caplog.text for key in keys.values())


def test_mounted_routes_get_the_same_keys_and_limits(tmp_path: Path) -> None:
    async def whoami(request: Request) -> Response:
        owner = principal(request)
        return JSONResponse([str(owner.scope), owner.rollout_id, owner.attempt_id])

    settings = Settings(database=tmp_path / "s.db", admin_key="k", max_body_mib=1)

    async def page(_request: Request) -> Response:
        return JSONResponse("open")

    async def size(request: Request) -> Response:
        return JSONResponse(len(await request.body()))

    routes = [
        Route("/v1/whoami", whoami),
        Route("/page", page),
        Route("/v1/size", size, methods=["POST"]),
    ]
    with Store(settings.database) as store:
        app = create_app(store, gateway=routes, settings=settings, open_paths=frozenset({"/page"}))
        store.enqueue([queued("r")])
        (claim,) = store.claim("w")
        with serve_in_thread(app) as running:
            for key, expected in (("k", ["admin", None, None]), (claim.key, ["attempt", "r", "r-1"])):
                headers = {"Authorization": f"Bearer {key}"}
                assert httpx.get(running.url + "/v1/whoami", headers=headers).json() == expected
            assert httpx.get(running.url + "/v1/whoami").status_code == 401
            for mib, status in ((1, 200), (2, 413)):
                body, headers = b"x" * (mib * 1024 * 1024 + mib - 1), {"Authorization": "Bearer k"}
                assert (
                    httpx.post(running.url + "/v1/size", content=body, headers=headers).status_code == status
                )
            assert httpx.get(running.url + "/page").json() == "open"


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_listening_beyond_this_machine_needs_a_key(tmp_path: Path, host: str) -> None:
    settings = Settings(host=host, database=tmp_path / "s.db")
    with pytest.raises(InvalidInput, match="AGENTLIGHTNING_ADMIN_KEY"):
        settings.with_admin_key()
    assert Settings(host=host, admin_key="mine").with_admin_key().admin_key == "mine"


def test_on_loopback_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    settings = Settings(database=tmp_path / "data" / "s.db")
    first = settings.with_admin_key().admin_key
    file = tmp_path / "data" / "admin.key"
    assert first is not None
    assert len(first) > 40
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert settings.with_admin_key().admin_key == first == file.read_text().strip()


def test_settings_come_from_the_environment_and_arguments_win() -> None:
    env = {"AGENTLIGHTNING_PORT": "9000", "AGENTLIGHTNING_DURABILITY": "normal", "OTHER": "x"}
    settings = Settings.from_env(env, host="::1", port=None)
    assert (settings.port, settings.durability, settings.host) == (9000, "normal", "::1")
    assert Settings.from_env(env, port=1).port == 1
    for name, text in (("PORT", "many"), ("DURABILITY", "some")):
        with pytest.raises(InvalidInput, match=f"AGENTLIGHTNING_{name}"):
            Settings.from_env({f"AGENTLIGHTNING_{name}": text})
