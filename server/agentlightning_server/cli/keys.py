"""`agl keys`: make, list and revoke the keys of a running server.

A key is printed once, to standard output; everything else about it goes to standard error.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from agentlightning.client import LightningClient
from agentlightning.errors import InvalidInput
from agentlightning_server.cli import options
from agentlightning_server.cli.options import say
from agentlightning_server.store import Scope

keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke keys; needs an admin key.")
MADE = [scope for scope in Scope if scope is not Scope.ATTEMPT]

ServerOption = Annotated[str, typer.Option(envvar="AGENTLIGHTNING_URL", help="URL of the server.")]
KeyOption = Annotated[
    str,
    typer.Option(
        envvar=["AGENTLIGHTNING_ADMIN_KEY", "AGENTLIGHTNING_KEY"], help="Admin key.", show_envvar=True
    ),
]
ProjectOption = Annotated[
    str | None,
    typer.Option(help="Project whose keys are meant; another than the key's own takes the server's own key."),
]


@keys.command()
def create(
    scope: Annotated[
        str, typer.Option(help=f"What it may do: {', '.join(MADE)}; see the README.", show_default=False)
    ],
    server: ServerOption,
    key: KeyOption,
    project: ProjectOption = None,
    name: Annotated[str, typer.Option(help="What to call it, to know it again.")] = "",
    expires_days: Annotated[float, typer.Option(min=0, help="Days until it ends; 0 for never.")] = 0.0,
) -> None:
    """Make a key and print it; it cannot be shown again."""
    if scope not in MADE:
        raise InvalidInput(f"--scope {scope!r} is none of {', '.join(MADE)}")
    with LightningClient(server, key, project=project) as client:
        made = client.mint_key(scope, name, expires_days * 86_400)
    typer.echo(made)
    say(f"a key of scope {scope}: keep it now, it is not shown again")


@keys.command(name="list")
def list_keys(
    server: ServerOption, key: KeyOption, project: ProjectOption = None, as_json: options.JsonOption = False
) -> None:
    """The project's keys, without the keys themselves and without those of attempts."""
    with LightningClient(server, key, project=project) as client:
        found = client.list_keys()
    if as_json:
        typer.echo(json.dumps(found))
        return
    for one in found:
        ends = "never ends" if one["expires_ns"] is None else f"ends {_day(one['expires_ns'])}"
        typer.echo(f"{one['id']}  {one['scope']:<8}  made {_day(one['created_ns'])}  {ends}  {one['name']}")


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `agl keys list` shows it.")],
    server: ServerOption,
    key: KeyOption,
    project: ProjectOption = None,
) -> None:
    """End a key; requests with it are refused from then on."""
    with LightningClient(server, key, project=project) as client:
        client.revoke_key(key_id)
    say(f"{key_id} is revoked")


def _day(time_ns: Any) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M")
