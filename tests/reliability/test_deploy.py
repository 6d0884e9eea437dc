"""What `deploy/` says is true of this version: its commands, variables, extras and paths exist."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
import yaml

from agentlightning_server.cli.commands import app
from agentlightning_server.routes.openapi import DESCRIPTION

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMMANDS: Any = typer.main.get_command(app)


def documents() -> Iterator[Any]:
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def containers() -> Iterator[Any]:
    for document in documents():
        if document["kind"] == "Deployment":
            yield from document["spec"]["template"]["spec"]["containers"]


def options_of(command: str) -> tuple[set[str], set[str]]:
    """Options of a command of `agl`, and the environment variables that it reads."""
    parameters = COMMANDS.commands[command].params
    names = {name for parameter in parameters for name in parameter.opts}
    variables: set[str] = set()
    for parameter in parameters:
        given = parameter.envvar or ()
        variables |= {given} if isinstance(given, str) else set(given)
    return names, variables


def test_commands_and_variables_of_the_containers_exist() -> None:
    seen: list[str] = []
    for container in containers():
        command, *arguments = container["args"]
        options, variables = options_of(command)
        assert {a for a in arguments if a.startswith("--")} <= options
        assert {entry["name"] for entry in container["env"]} <= variables
        seen.append(command)
    assert seen == ["run", "serve"]


def test_probes_ask_open_paths_and_labels_meet() -> None:
    (server,) = [c for c in containers() if c["args"][0] == "serve"]
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        path = server[probe]["httpGet"]["path"]
        assert DESCRIPTION["paths"][path]["get"]["security"] == []
    by_kind = {(d["kind"], d["metadata"]["name"]): d for d in documents()}
    service = by_kind["Service", "agentlightning"]["spec"]
    deployment = by_kind["Deployment", "agentlightning-server"]["spec"]
    assert service["selector"] == deployment["template"]["metadata"]["labels"]
    assert service["ports"][0]["port"] == server["ports"][0]["containerPort"] == 8700


def test_the_image_installs_extras_that_exist_and_starts_a_command_that_does() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"'\.\[(.+?)\]'", text)
    assert set(named.split(",")) <= extras.keys()
    (command,) = re.findall(r"^CMD (\[.+\])$", text, re.MULTILINE)
    name, *arguments = yaml.safe_load(command)
    assert {a for a in arguments if a.startswith("--")} <= options_of(name)[0]
    for source in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / part).exists() for part in source.split())
