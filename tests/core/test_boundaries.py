"""Who may import whom, held on the source text; and what a thin client loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "agentlightning"
SERVER = ROOT / "server" / "agentlightning_server"
ADAPTERS = {
    "agentlightning_langchain": ROOT / "adapters/langchain/agentlightning_langchain",
    "agentlightning_autogen": ROOT / "adapters/autogen/agentlightning_autogen",
}
FRAMEWORKS = {
    "agents",
    "autogen_agentchat",
    "autogen_core",
    "autogen_ext",
    "crewai",
    "langchain",
    "langchain_core",
    "langchain_openai",
    "langgraph",
}
VERL = SERVER / "verl"
VERLS = {"hydra", "omegaconf", "ray", "tensordict", "transfer_queue", "verl", "vllm"}
TORCH = {"torch", "transformers", "peft", "accelerate", "gguf"}


def imports(path: Path, *, module_level: bool = False) -> set[str]:
    """Top-level names of the packages a file imports; with `module_level` only those at import time."""
    tree = ast.parse(path.read_text())
    return set(_names(tree.body if module_level else list(ast.walk(tree)), module_level))


def _names(nodes: list[ast.stmt] | list[ast.AST], module_level: bool) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]
        elif module_level and isinstance(node, ast.Try):
            yield from _names(node.body, module_level)


def files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, f"no source in {folder}"
    return found


@pytest.mark.parametrize("path", files(CORE), ids=lambda p: str(p.relative_to(CORE)))
def test_core_imports_no_framework_no_torch_and_no_server(path: Path) -> None:
    forbidden = FRAMEWORKS | TORCH | set(ADAPTERS) | {"agentlightning_server", "starlette", "sqlalchemy"}
    assert not imports(path) & forbidden


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_know_neither_each_other_nor_the_server(name: str) -> None:
    forbidden = (set(ADAPTERS) - {name}) | {"agentlightning_server"} | TORCH
    for path in files(ADAPTERS[name]):
        assert not imports(path) & forbidden, path


def test_the_server_knows_no_framework_and_no_adapter() -> None:
    for path in files(SERVER):
        assert not imports(path) & (FRAMEWORKS | set(ADAPTERS)), path


def test_torch_is_imported_where_models_are_computed_only() -> None:
    for path in files(SERVER):
        if path.is_relative_to(SERVER / "engines" / "embedded") or path.is_relative_to(VERL):
            continue
        assert not imports(path) & TORCH, path


def test_only_the_verl_package_speaks_verls_types() -> None:
    for path in files(SERVER):
        if not path.is_relative_to(VERL):
            assert not imports(path) & VERLS, path


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(run.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_by("import agentlightning")
    assert not loaded & (FRAMEWORKS | TORCH | {"opentelemetry", "httpx", "numpy", "agentlightning_server"})


def test_the_light_tracer_needs_no_opentelemetry() -> None:
    loaded = loaded_by("import agentlightning\nagentlightning.LightTracer")
    assert "opentelemetry" not in loaded


def test_the_runner_needs_no_server_and_no_torch() -> None:
    loaded = loaded_by("import agentlightning.runner.__main__")
    assert not loaded & (TORCH | {"agentlightning_server", "starlette", "sqlalchemy"})


def test_the_command_line_starts_without_torch() -> None:
    assert not loaded_by("import agentlightning_server.cli.commands") & TORCH
