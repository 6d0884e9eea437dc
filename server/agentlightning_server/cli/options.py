"""What several commands of `agl` share: options, and what their values mean together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from agentlightning.errors import InvalidInput

DEFAULT_POLICY = "policy"
console = Console(stderr=True)

AgentArgument = Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="Function that runs one task.")]
TasksOption = Annotated[Path, typer.Option("--tasks", help="JSONL file, one task a line.")]
ModelOption = Annotated[str, typer.Option(help="Hugging Face folder or hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]
ConcurrencyOption = Annotated[int, typer.Option(min=1, help="Attempts at the same time.")]
TracerOption = Annotated[str, typer.Option(help="otel or light.")]
HostOption = Annotated[str, typer.Option(help="Address to listen on; beyond loopback needs --admin-key.")]
PortOption = Annotated[int, typer.Option(help="Port to listen on; 0 takes any.")]
AdminKeyOption = Annotated[
    str | None,
    typer.Option(envvar="AGENTLIGHTNING_ADMIN_KEY", help="Key of the server; made when not given."),
]
PoliciesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="Name that agents ask for the model by. Several are LoRA adapters on one model, for an agent "
        "each: give --lora-rank. Runners are told the first.",
    ),
]
TrainPoliciesOption = Annotated[
    list[str] | None,
    typer.Option("--train-policy", help="Train only these of the policies; the others stay as they are."),
]
LoraRankOption = Annotated[int, typer.Option(min=0, help="0 trains the full weights.")]
UpstreamsOption = Annotated[
    Path | None,
    typer.Option(
        envvar="AGENTLIGHTNING_UPSTREAMS",
        help="TOML or JSON file of models that other endpoints answer, by name: "
        '{"checker": {"url": "https://api.openai.com/v1", "model": "gpt-4.1-mini", '
        '"key_env": "OPENAI_API_KEY"}}. Their calls are recorded and never trained on.',
    ),
]


def policies_of(names: Sequence[str] | None) -> tuple[str, ...]:
    """The policies that `--policy` names."""
    return tuple(names or (DEFAULT_POLICY,))


def trained_of(policies: Sequence[str], names: Sequence[str] | None) -> tuple[str, ...]:
    """The policies to train: all, or those that `--train-policy` names. Raises InvalidInput for others."""
    if unknown := [name for name in names or () if name not in policies]:
        raise InvalidInput(
            f"--train-policy {', '.join(unknown)} is none of the policies ({', '.join(policies)}): "
            "name it with --policy too"
        )
    return tuple(name for name in policies if not names or name in names)


def say(line: str) -> None:
    """A line that can be copied: not coloured, not wrapped."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
