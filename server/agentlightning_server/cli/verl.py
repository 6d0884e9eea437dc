"""`--engine verl` of `agl train`, `agl serve` and `agl doctor`: a file in VeRL's words, and options over it.

An option given on the command line wins over the file, the file over an option's default. VeRL is imported by
what is called here, never by this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from agentlightning.doctor import Finding
from agentlightning.errors import InvalidInput
from agentlightning_server.cli.option_groups import Given
from agentlightning_server.training.trainer import TrainSettings
from agentlightning_server.verl.config import VerlFile, read_file


class EngineKind(StrEnum):
    """What samples and learns."""

    EMBEDDED = "embedded"
    VERL = "verl"


EngineOption = Annotated[
    EngineKind, typer.Option("--engine", help="embedded: in this process. verl: VeRL and vLLM on Ray.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file of VeRL's settings, for --engine verl; options given here win over it.",
    ),
]

FROM_FILE: Final[Mapping[str, str]] = {
    "steps": "trainer.total_training_steps",
    "tasks_per_step": "data.train_batch_size",
    "group_size": "actor_rollout_ref.rollout.n",
    "seed": "data.seed",
    "eval_every": "trainer.test_freq",
    "checkpoint_every": "trainer.save_freq",
}
"""Options by VeRL's name for the same thing."""
INTO_FILE: Final[Mapping[str, tuple[str, ...]]] = {
    "learning_rate": ("actor_rollout_ref", "actor", "optim", "lr"),
    "lora_rank": ("actor_rollout_ref", "model", "lora_rank"),
}
INSTEAD: Final[Mapping[str, str]] = {
    "kl_coefficient": "actor_rollout_ref.actor.use_kl_loss and kl_loss_coef",
    "kl_estimator": "actor_rollout_ref.actor.kl_loss_type",
    "epochs": "actor_rollout_ref.actor.ppo_epochs",
    "minibatches": "actor_rollout_ref.actor.ppo_mini_batch_size",
    "importance_cap": "algorithm.rollout_correction",
    "critic": "algorithm.adv_estimator: gae",
    "clip_low": "actor_rollout_ref.actor.clip_ratio_low",
    "clip_high": "actor_rollout_ref.actor.clip_ratio_high",
}
"""What to write into the file for options that belong to the embedded engine."""


def require_verl() -> None:
    """Raises InvalidInput naming what is not installed."""
    from agentlightning_server.verl.doctor import INSTALL

    missing = [name for name in ("verl", "ray", "vllm", "transfer_queue") if find_spec(name) is None]
    if missing:
        raise InvalidInput(f"--engine verl needs {', '.join(missing)}: {INSTALL}")


def configuration(
    path: Path | None, values: Mapping[str, Any], ctx: typer.Context, update: Given
) -> VerlFile:
    """The file, with what `values` were given on the command line. Raises InvalidInput."""
    if path is None:
        raise InvalidInput(
            "--engine verl needs --config FILE; examples/calcx_math/verl has some to start from"
        )
    if update:
        told = "; ".join(f"{name}: {INSTEAD.get(name, 'not on VeRL')}" for name in update)
        raise InvalidInput(f"with --engine verl these are set in {path} instead: {told}")
    file = read_file(path)
    for name, place in INTO_FILE.items():
        if is_given(ctx, name) and name in values:
            file = replace(file, verl=_with(file.verl, place, values[name]))
    return file


def settings_for(training: TrainSettings, file: VerlFile, ctx: typer.Context) -> TrainSettings:
    """The run's settings, where the command line is silent as the file has them."""
    found = {
        name: file.get(dotted)
        for name, dotted in FROM_FILE.items()
        if not is_given(ctx, name) and file.get(dotted)
    }
    if len(training.policies) > 1:
        raise InvalidInput("VeRL trains one policy: name one with --policy, or use the embedded engine")
    policy = training.policies[0] if training.policies else training.learning.policy
    return replace(training, learning=replace(training.learning, policy=policy), **found)


def model_for(model: str, file: VerlFile, ctx: typer.Context) -> str:
    """The option's, or the file's."""
    return model if is_given(ctx, "model") else file.get("actor_rollout_ref.model.path") or model


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether the option stands on the command line (or in the environment)."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _with(section: Mapping[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = place
    return {**section, first: _with(section.get(first) or {}, tuple(rest), value) if rest else value}


def refuse_for_verl(**unsupported: bool) -> None:
    """Raises InvalidInput naming what was asked for and VeRL cannot do here."""
    if asked := [f"--{name.replace('_', '-')}" for name, given in unsupported.items() if given]:
        raise InvalidInput(f"{', '.join(asked)}: only the embedded engine can do that")


def preflight_findings(
    path: Path | None, model: str, output: Path, port: int, ctx: typer.Context
) -> list[Finding]:
    """What `agl doctor --engine verl` finds."""
    from agentlightning_server.verl.doctor import preflight

    file = configuration(path, {}, ctx, {})
    training = settings_for(TrainSettings(run_id="doctor", output=output), file, ctx)
    return preflight(file, training, model=model_for(model, file, ctx), port=port)
