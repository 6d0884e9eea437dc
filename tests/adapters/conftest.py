"""Each adapter test runs against a real HTTP server, once with each tracer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.adapters.recorded import recording
from tests.adapters.scripted_server import ScriptedServer


@pytest.fixture(params=["light", "otel"])
def server(request: pytest.FixtureRequest) -> Iterator[ScriptedServer]:
    with recording(request.param) as running:
        yield running
