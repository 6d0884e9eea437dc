"""The API as described: complete, and whatever fits or breaks the description is no server error (R4)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from tests.support.scale import scaled
from tests.support.scripted_engine import ScriptedEngine
from tests.support.serving import serving, tiny_engine
from tests.support.stores import plain_span, queued

from agentlightning_server.gateway import gateway_routes
from agentlightning_server.routes import store_routes
from agentlightning_server.routes.openapi import DESCRIPTION
from agentlightning_server.routes.operations import operations_routes
from agentlightning_server.settings import Settings
from agentlightning_server.training.local import LocalServer

EXAMPLES = scaled(8, 100)  # for each operation and mode


class _Talkative(ScriptedEngine):
    """Always has an answer."""

    async def generate(self, *arguments: Any, **options: Any) -> Any:
        self.script["policy"].append("yes")
        return await super().generate(*arguments, **options)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[LocalServer]:
    folder = tmp_path_factory.mktemp("openapi")
    inner = tiny_engine(folder)
    with serving(_Talkative(inner), folder) as running:  # type: ignore[arg-type]
        running.store.enqueue([queued("r")])
        running.store.add_spans([plain_span(1, "r")])
        yield running


def test_every_route_is_described(server: LocalServer) -> None:
    nothing: Any = None
    routes = [
        *store_routes(server.store, Settings(), nothing),
        *operations_routes(server.store, nothing, nothing),
        *gateway_routes(server.gateway),
    ]
    real = {
        (route.path.replace(":path", ""), method.lower())
        for route in routes
        if not route.path.endswith("/v1/responses")  # says that it is not served
        for method in route.methods or ()
        if method != "HEAD"
    }
    described = {(path, method) for path, item in DESCRIPTION["paths"].items() for method in item}
    assert real == described


def test_the_description_is_valid_and_served(server: LocalServer) -> None:
    headers = {"Authorization": f"Bearer {server.key}"}
    served = httpx.get(server.url + "/openapi.json", headers=headers).json()
    assert served == DESCRIPTION
    schemathesis.openapi.from_dict(served).validate()


def _schema() -> Any:
    config = SchemathesisConfig()
    config.projects.default.generation.modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    return schemathesis.openapi.from_dict(DESCRIPTION, config=config)


schema = _schema()


# Hypothesis sees the server's thread draw random numbers, and takes that for its strategies' doing.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@schema.parametrize()
@hypothesis_settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.generate],
)
def test_no_request_is_a_server_error(case: Any, server: LocalServer) -> None:
    answer = case.call(base_url=server.url, headers={"Authorization": f"Bearer {server.key}"}, timeout=30)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and answer.headers["content-type"] == "application/json":
        assert set(answer.json()["error"]) == {"message", "type", "code"}
