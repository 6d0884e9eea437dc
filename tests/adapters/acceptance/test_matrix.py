"""Every cell of the acceptance matrix; see harness.py."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.adapters.acceptance.harness import Case, Driver, Stage, Way, play, skip_reason, staged

ROOT = Path(__file__).parents[3]
NEEDS = {
    "langchain": "langchain_openai",
    "openai_agents": "agents",
    "autogen": "autogen_agentchat",
    "crewai": "crewai",
}
INSTALLED = [name for name, module in NEEDS.items() if importlib.util.find_spec(module) is not None]


def driver_of(name: str) -> Driver:
    driver: Driver = importlib.import_module(f"tests.adapters.acceptance.drive_{name}").DRIVER
    return driver


@pytest.fixture(scope="module", params=["light", "otel"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("stage"), request.param) as running:
        yield running


@pytest.fixture(scope="module", params=INSTALLED)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    chosen = driver_of(request.param)
    chosen.instrument()
    yield chosen
    chosen.uninstrument()


# AutoGen serialises parsed answers in a way that pydantic warns of; CrewAI uses what it deprecated.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")
@pytest.mark.parametrize("way", list(Way), ids=str)
@pytest.mark.parametrize("case", list(Case), ids=str)
def test_cell(stage: Stage, driver: Driver, way: Way, case: Case) -> None:
    reason = skip_reason(driver, way, case)
    if reason is not None:
        pytest.skip(reason)
    play(driver, way, case, stage)


@pytest.mark.parametrize("name", INSTALLED)
def test_missing_cells_are_explained_in_the_adapters_readme(name: str) -> None:
    driver = driver_of(name)
    readme = re.sub(r"\s+", " ", (ROOT / driver.readme).read_text())
    reasons = {skip_reason(driver, way, case) for way in Way for case in Case} - {None}
    assert reasons
    for reason in reasons:
        assert str(reason) in readme, f"{driver.readme} does not say: {reason}"
