"""How each adapter is found by OpenTelemetry, and what it says where its framework is missing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

import pytest
from tests.adapters import quiet_crewai  # pyright: ignore[reportUnusedImport]  # noqa: F401

ADAPTERS = [
    ("langchain", "langchain", "langchain_core.callbacks", "LangChainInstrumentor"),
    ("openai_agents", "openai-agents", "agents", "OpenAIAgentsInstrumentor"),
    ("autogen", "autogen", "autogen_agentchat", "AutoGenInstrumentor"),
    ("crewai", "crewai", "crewai", "CrewAIInstrumentor"),
]
"""Name, extra, a module of the framework, the instrumentor's class."""

MISSING = """
import sys
sys.modules[sys.argv[2]] = None
try:
    __import__("agentlightning_" + sys.argv[1])
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(("name", "extra", "module", "instrumentor"), ADAPTERS)
def test_the_entry_point_names_the_instrumentor(
    name: str, extra: str, module: str, instrumentor: str
) -> None:
    if find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{module} is not installed here")
    (found,) = entry_points(group="opentelemetry_instrumentor", name=f"agentlightning_{name}")
    assert found.load() is getattr(importlib.import_module(f"agentlightning_{name}"), instrumentor)


@pytest.mark.parametrize(("name", "extra", "module", "instrumentor"), ADAPTERS)
def test_a_missing_framework_names_the_extra_to_install(
    name: str, extra: str, module: str, instrumentor: str
) -> None:
    out = subprocess.run(
        [sys.executable, "-c", MISSING, name, module], capture_output=True, text=True, check=True
    )
    assert f"pip install '.[{extra}]'" in out.stdout
