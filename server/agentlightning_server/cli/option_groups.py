"""Options that several commands share as a group, each named like the setting that it sets.

A command takes a group as one parameter, a mapping with what was given on the command line; what was not
given is absent, so that the defaults stand in the settings alone:

    @option_group("learning", LEARNING)
    def train(..., learning: Given) -> None:
        settings = learning_of(learning)
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import typer

from agentlightning.bridge import LearningSettings
from agentlightning.errors import InvalidInput
from agentlightning.learning import CREDIT, Estimator, Normalise
from agentlightning.named_learning import NamedLearning
from agentlightning_server.engines.embedded.settings import KLEstimator
from agentlightning_server.settings import CHOICES
from agentlightning_server.store import is_url

Given: TypeAlias = Mapping[str, Any]  # no text: Typer evaluates it in the module of the command
Options: TypeAlias = Mapping[str, Any]
"""Annotated types by the name of the setting."""

_LEARNING, _UPDATE, _OPERATING = "Learning", "Update", "Operating"  # headings of the help

OPERATING: Final[Options] = {
    "database": Annotated[
        str | None,
        typer.Option(
            envvar="AGENTLIGHTNING_DATABASE",
            help="SQLite file, or postgresql://user:password@host/name, which several servers may share.  "
            "\\[default: store.db in --data]",
            rich_help_panel=_OPERATING,
        ),
    ],
    "durability": Annotated[
        str | None,
        typer.Option(
            envvar="AGENTLIGHTNING_DURABILITY",
            help='"full" outlives power loss, "normal" a killed process only.  \\[default: full]',
            rich_help_panel=_OPERATING,
        ),
    ],
    "retain_days": Annotated[
        float | None,
        typer.Option(
            envvar="AGENTLIGHTNING_RETAIN_DAYS",
            min=0,
            help="Delete rollouts that ended longer ago, but none that a run still needs.",
            rich_help_panel=_OPERATING,
        ),
    ],
    "retain_gib": Annotated[
        float | None,
        typer.Option(
            envvar="AGENTLIGHTNING_RETAIN_GIB",
            min=0,
            help="Delete the oldest such rollouts while the database is larger.",
            rich_help_panel=_OPERATING,
        ),
    ],
    "log_format": Annotated[
        str | None,
        typer.Option(
            envvar="AGENTLIGHTNING_LOG_FORMAT",
            help='"text" or "json".  \\[default: text]',
            rich_help_panel=_OPERATING,
        ),
    ],
    "log_level": Annotated[
        str | None,
        typer.Option(
            envvar="AGENTLIGHTNING_LOG_LEVEL",
            help='"info" logs every request: its route, status and time.  \\[default: warning]',
            rich_help_panel=_OPERATING,
        ),
    ],
    "trace_server": Annotated[
        bool | None,
        typer.Option(
            "--trace-server",
            envvar="AGENTLIGHTNING_TRACE_SERVER",
            help="Send spans of the server's own requests to OTEL_EXPORTER_OTLP_ENDPOINT.",
            rich_help_panel=_OPERATING,
        ),
    ],
}
LEARNING: Final[Options] = {
    "air": Annotated[
        bool | None,
        typer.Option(
            "--air/--no-air",
            help="Rewards by AIR's default rules; without, by --air-rule alone.  \\[default: air]",
            rich_help_panel=_LEARNING,
        ),
    ],
    "air_rules": Annotated[
        list[str] | None,
        typer.Option(
            "--air-rule",
            metavar="MODULE:FUNCTION",
            help="A rule of yours: (episode) -> {call: reward} or signals; may be repeated.",
            rich_help_panel=_LEARNING,
        ),
    ],
    "air_bound": Annotated[
        float | None,
        typer.Option(
            "--air-bound",
            min=0,
            help="Most that an episode's signals of one sign may add up to.  \\[default: 0.3]",
            rich_help_panel=_LEARNING,
        ),
    ],
    "air_fine": Annotated[
        float | None,
        typer.Option(
            "--air-fine",
            min=0,
            help="What a failed tool call costs; above 0, an agent that mostly fails learns to call none.  "
            "\\[default: 0]",
            rich_help_panel=_LEARNING,
        ),
    ],
    "credit": Annotated[
        str | None,
        typer.Option(
            help=f"How calls share a return: {', '.join(CREDIT)}, or MODULE:FUNCTION.  "
            "\\[default: identical]",
            rich_help_panel=_LEARNING,
        ),
    ],
    "estimator": Annotated[
        Estimator | None,
        typer.Option(help="Baseline of the advantages.  \\[default: grpo]", rich_help_panel=_LEARNING),
    ],
    "by_agent": Annotated[
        bool | None,
        typer.Option(
            "--by-agent/--across-agents",
            help="Compare each agent's calls with that agent's only.",
            rich_help_panel=_LEARNING,
        ),
    ],
    "step_groups": Annotated[
        float | None,
        typer.Option(
            metavar="WEIGHT",
            min=0,
            help="Weight of comparing calls made in the same state (GiGPO); 0 for none.  \\[default: 0]",
            rich_help_panel=_LEARNING,
        ),
    ],
    "normalise": Annotated[
        Normalise | None,
        typer.Option(
            help="What weighs the same in the loss.  \\[default: episode, constant for dr_grpo]",
            rich_help_panel=_LEARNING,
        ),
    ],
    "agents": Annotated[
        list[str] | None,
        typer.Option(
            "--agent", help="Only calls of these agents (name or node path, glob).", rich_help_panel=_LEARNING
        ),
    ],
    "select": Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Only calls for which this function of a Transition is true; with --agent, of those.",
            rich_help_panel=_LEARNING,
        ),
    ],
}
"""Settings of `NamedLearning`."""

INTERMEDIATE: Final[Options] = {
    name: LEARNING[name] for name in ("air", "air_rules", "air_bound", "air_fine")
}
WORTH: Final[Options] = INTERMEDIATE | {name: LEARNING[name] for name in ("credit", "agents", "select")}
"""Those that say what single calls are worth, without comparing them."""

UPDATE: Final[Options] = {
    "kl_coefficient": Annotated[
        float | None,
        typer.Option(
            "--kl",
            min=0,
            help="Weight of a penalty on leaving the base model.  \\[default: 0]",
            rich_help_panel=_UPDATE,
        ),
    ],
    "kl_estimator": Annotated[
        KLEstimator | None,
        typer.Option(help="How that is estimated.  \\[default: k3]", rich_help_panel=_UPDATE),
    ],
    "epochs": Annotated[
        int | None,
        typer.Option(
            min=1, help="Passes of an update over its batch.  \\[default: 1]", rich_help_panel=_UPDATE
        ),
    ],
    "minibatches": Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps of one pass.  \\[default: 1]", rich_help_panel=_UPDATE),
    ],
    "importance_cap": Annotated[
        float | None,
        typer.Option(
            help="Weigh stale rollouts by how likely they are now, at most by this.", rich_help_panel=_UPDATE
        ),
    ],
    "critic": Annotated[
        bool | None,
        typer.Option(
            "--critic/--no-critic",
            help="Advantages by a value head and GAE (PPO) instead of groups.",
            rich_help_panel=_UPDATE,
        ),
    ],
    "clip_low": Annotated[
        float | None,
        typer.Option(min=0, help="Clip ratios below 1 - this.  \\[default: 0.2]", rich_help_panel=_UPDATE),
    ],
    "clip_high": Annotated[
        float | None,
        typer.Option(min=0, help="Clip ratios above 1 + this.  \\[default: 0.28]", rich_help_panel=_UPDATE),
    ],
}
"""Settings of `EmbeddedSettings`."""


def option_group(parameter: str, options: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: these options in place of the command's parameter, which gets those that were given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != parameter]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in options.items()
        ]

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            found = {name: values.pop(name) for name in options}
            given = {name: value for name, value in found.items() if value not in (None, [])}
            command(**values, **{parameter: given})

        vars(with_options)["__signature__"] = signature.replace(parameters=[*own, *added])
        return with_options

    return decorate


def operating_of(given: Given, database: Path) -> dict[str, Any]:
    """Fields of `Settings`, with the database where none was named. Raises InvalidInput."""
    for name, choices in CHOICES.items():
        if name in given and given[name] not in choices:
            raise InvalidInput(f"--{name.replace('_', '-')} must be {' or '.join(choices)}")
    where = str(given.get("database") or database)
    return {**given, "database": where if is_url(where) else Path(where)}


def learning_of(given: Given, base: NamedLearning | None = None) -> LearningSettings:
    """The settings that the options make of `base`, the defaults where there is none."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # a console script does not look there for the user's module
    return (base or NamedLearning()).changed(given).settings()
