"""VeRL's settings for a run: VeRL's defaults, what our parts need, a user's file, and what the run says.

The file is YAML in VeRL's own words, with one section of ours:

    agentlightning: {cpu: false, stall_s: 1800}
    trainer: {n_gpus_per_node: 8}
    actor_rollout_ref: {rollout: {gpu_memory_utilization: 0.6}}

Later layers win: VeRL < ours < (a CPU's) < the file < the run. Invariant: a key that VeRL does not have is an
error, except below the sections that VeRL passes on unread.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, cast

from agentlightning.bridge import LearningSettings
from agentlightning.errors import InvalidInput
from agentlightning_server.training.trainer import TrainSettings
from agentlightning_server.verl.names import (
    CPU_MODULE,
    CPU_WORKER,
    DATASET,
    ESTIMATOR_MODULE,
    LOSS,
    MANAGER,
    estimator_of,
    is_ours,
)
from agentlightning_server.verl.rows import Placed

ENDLESS_EPOCHS: Final = 1 << 30  # a run ends by its steps
OPEN: Final = (
    "actor_rollout_ref.model.override_config",
    "actor_rollout_ref.rollout.engine_kwargs",
    "actor_rollout_ref.rollout.agent",
    "actor_rollout_ref.rollout.enable_sleep_mode",
    "critic.model.override_config",
    "ray_kwargs.ray_init",
    "trainer.v1",
)
"""Below these, VeRL takes keys that its defaults do not list."""


_LOGPROBS: Final = "actor_rollout_ref.rollout.logprobs_mode"


@dataclass(frozen=True, slots=True)
class Own:
    """The file's section `agentlightning`."""

    cpu: bool = False
    """Run without a GPU: VeRL's FSDP and vLLM's CPU build, for tests and for learning how it works."""
    stall_s: float = 1800.0
    """How long VeRL may work without a sign of life before the run is given up; a step's update must fit in.
    VeRL waits for ever where a vLLM worker fails while it gets new weights."""
    step_timeout_s: float = 3600.0
    """When rollouts of a step that have not ended are cancelled."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Environment variables of all processes of VeRL."""


@dataclass(frozen=True, slots=True)
class VerlFile:
    """A configuration file, read."""

    path: Path | None
    own: Own
    verl: Mapping[str, Any]

    def get(self, dotted: str, default: Any = None) -> Any:
        """What the file says of a key of VeRL's."""
        value: Any = self.verl
        for part in dotted.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = cast("Mapping[str, Any]", value)[part]
        return value


def read_file(path: Path) -> VerlFile:
    """Read a configuration file. Raises InvalidInput naming it and what is wrong."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(f"cannot read the VeRL configuration {path}: {error}") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path} must map VeRL's sections (trainer, actor_rollout_ref, ...) to settings")
    sections = cast("dict[str, Any]", content)
    own = sections.pop("agentlightning", None) or {}
    known = {f.name for f in fields(Own)}
    if unknown := sorted(set(own) - known):
        raise InvalidInput(f"{path}: agentlightning has no {', '.join(unknown)}; it takes {', '.join(known)}")
    return VerlFile(path, Own(**own), sections)


def compose(
    file: VerlFile,
    training: TrainSettings,
    *,
    model: str,
    train_tasks: Path,
    val_tasks: Path,
    validates: bool,
) -> Any:
    """The configuration that VeRL is started with. Raises InvalidInput for keys that it does not know."""
    from hydra import compose as compose_hydra
    from hydra import initialize_config_module
    from omegaconf import OmegaConf

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose_hydra("ppo_trainer")
    OmegaConf.set_struct(config, False)
    if unknown := sorted(_unknown(file.verl, OmegaConf.to_container(config))):
        raise InvalidInput(f"{file.path}: VeRL has no setting {', '.join(unknown)}")
    layers: list[Mapping[str, Any]] = [_ours(training.learning), *([CPU] if file.own.cpu else []), file.verl]
    layers.append(_run(training, model, train_tasks, val_tasks, validates))
    for layer in layers:
        config = OmegaConf.merge(config, OmegaConf.create(dict(layer)))
    _adjust(config, file, training)
    _validate(config, file)
    return config


def environment(file: VerlFile, log: Path) -> dict[str, str]:
    """Environment variables that VeRL's processes need."""
    modules = [CPU_MODULE, ESTIMATOR_MODULE] if file.own.cpu else [ESTIMATOR_MODULE]
    given = {
        "VERL_USE_EXTERNAL_MODULES": ",".join(modules),
        "VERL_FILE_LOGGER_PATH": str(log),
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        **(CPU_ENVIRONMENT if file.own.cpu else {}),
    }
    return {**given, **{name: str(value) for name, value in file.own.env.items()}}


def placed_for(config: Any) -> Placed:
    """Where rewards stand for the estimator that was chosen."""
    return Placed.EARNED if config.algorithm.adv_estimator == "gae" else Placed.RETURN


# --- the layers ----------------------------------------------------------------------------------


def _ours(learning: LearningSettings) -> Mapping[str, Any]:
    """What our parts need, and defaults in which we differ from VeRL."""
    return {
        "algorithm": {"adv_estimator": estimator_of(learning)},
        "actor_rollout_ref": {
            "actor": {
                "clip_ratio_low": 0.2,
                "clip_ratio_high": 0.28,
                "use_kl_loss": False,
                "checkpoint": {"save_contents": ["model", "optimizer", "extra", "hf_model"]},
            },
            "rollout": {
                "name": "vllm",
                "agent": {"num_workers": 1},
                # The gateway's grammars are llguidance's.
                "engine_kwargs": {"vllm": {"structured_outputs_config": '{"backend": "guidance"}'}},
            },
        },
        "reward": {"num_workers": 1},
        "trainer": {"logger": ["console", "file"], "max_actor_ckpt_to_keep": 1, "max_critic_ckpt_to_keep": 1},
    }


def _run(
    training: TrainSettings, model: str, train_tasks: Path, val_tasks: Path, validates: bool
) -> Mapping[str, Any]:
    """What the run's own settings and our parts leave no choice about."""
    path, name = DATASET
    return {
        "data": {
            "train_files": [str(train_tasks)],
            "val_files": [str(val_tasks)],
            "custom_cls": {"path": path, "name": name},
            "train_batch_size": training.tasks_per_step,
            "shuffle": False,
            "validation_shuffle": False,
            "dataloader_num_workers": 0,
            "seed": training.seed,
        },
        "actor_rollout_ref": {
            "model": {"path": model},
            "rollout": {
                "n": training.group_size,
                "calculate_log_probs": True,
                "seed": training.seed,
                "agent": {"agent_loop_manager_class": MANAGER},
            },
        },
        "critic": {"model": {"path": model, "tokenizer_path": model}},
        "trainer": {
            "use_v1": True,
            "total_epochs": ENDLESS_EPOCHS,
            "total_training_steps": training.steps,
            "save_freq": training.checkpoint_every,
            "test_freq": (training.eval_every or training.steps) if validates else -1,
            "val_before_train": validates,
            "default_local_dir": str((training.output / "checkpoints").resolve()),
            "project_name": "agentlightning",
            "experiment_name": training.run_id,
        },
    }


FLOAT32: Final = {
    "mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
    "use_torch_compile": False,
}
"""Most CPUs compute bfloat16 slower than float32."""
CPU: Final[Mapping[str, Any]] = {
    "actor_rollout_ref": {
        "model": {
            "override_config": {"attn_implementation": "sdpa"},
            "use_remove_padding": False,
            "enable_gradient_checkpointing": False,
        },
        "actor": {
            "strategy": "fsdp2",
            "use_torch_compile": False,
            "ppo_micro_batch_size_per_gpu": 4,
            "fsdp_config": FLOAT32,
        },
        "ref": {
            "strategy": "fsdp2",
            "log_prob_micro_batch_size_per_gpu": 4,
            "use_torch_compile": False,
            "fsdp_config": FLOAT32,
        },
        "rollout": {
            "dtype": "float32",
            "tensor_model_parallel_size": 1,
            "enforce_eager": True,
            "enable_sleep_mode": False,
            "free_cache_engine": False,
            "log_prob_micro_batch_size_per_gpu": 4,
            "checkpoint_engine": {"update_weights_bucket_megabytes": 256},
            "engine_kwargs": {"vllm": {"worker_extension_cls": CPU_WORKER}},
        },
    },
    "critic": {
        "strategy": "fsdp2",
        "ppo_micro_batch_size_per_gpu": 4,
        "fsdp": FLOAT32,
        "model": {
            "override_config": {"attn_implementation": "sdpa"},
            "use_remove_padding": False,
            "enable_gradient_checkpointing": False,
        },
    },
    "transfer_queue": {"backend": {"SimpleStorage": {"num_data_storage_units": 1}}},
    "trainer": {"device": "cpu", "n_gpus_per_node": 1, "nnodes": 1},
    "ray_kwargs": {
        "ray_init": {
            "num_gpus": 1,  # a number that VeRL's placement asks for, no device
            "num_cpus": 32,
            "include_dashboard": False,
            "object_store_memory": 300_000_000,
        }
    },
}
CPU_ENVIRONMENT: Final[Mapping[str, str]] = {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "RAY_memory_monitor_refresh_ms": "0",  # kills workers when other programs need the memory
    "RAY_worker_niceness": "0",  # 15 by default, and a CPU computes in its workers
    "TOKENIZERS_PARALLELISM": "false",
}


# --- checks --------------------------------------------------------------------------------------


def _unknown(given: Mapping[str, Any], known: Any, where: str = "") -> Iterator[str]:
    for name, value in given.items():
        dotted = f"{where}{name}"
        if any(dotted == part or dotted.startswith(part + ".") for part in OPEN):
            continue
        if not isinstance(known, Mapping) or name not in known:
            yield dotted
        elif isinstance(value, Mapping) and isinstance(known[name], Mapping):
            yield from _unknown(cast("Mapping[str, Any]", value), known[name], f"{dotted}.")


def _adjust(config: Any, file: VerlFile, training: TrainSettings) -> None:
    from omegaconf import OmegaConf

    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    ours = is_ours(str(algorithm.adv_estimator))
    if file.get("actor_rollout_ref.actor.policy_loss.loss_mode") is None and ours:
        OmegaConf.update(config, "actor_rollout_ref.actor.policy_loss.loss_mode", LOSS)
    if config.critic.enable is None:
        config.critic.enable = algorithm.adv_estimator == "gae"
    if ours and algorithm.use_kl_in_reward:
        raise InvalidInput(
            f"{file.path}: algorithm.use_kl_in_reward changes rewards after our advantages were computed: "
            "use actor_rollout_ref.actor.use_kl_loss, or an adv_estimator of VeRL's"
        )
    if file.get("actor_rollout_ref.actor.ppo_mini_batch_size") is None:
        actor.ppo_mini_batch_size = training.tasks_per_step
        config.critic.ppo_mini_batch_size = training.tasks_per_step
    if config.actor_rollout_ref.rollout.temperature == 1.0 and not file.get(_LOGPROBS):
        # Of the whole vocabulary, as the trainer has them, also where a grammar or top-p limits the draw.
        OmegaConf.update(config, _LOGPROBS, "raw_logprobs")
    if config.actor_rollout_ref.rollout.max_model_len is None:
        config.actor_rollout_ref.rollout.max_model_len = (
            config.data.max_prompt_length + config.data.max_response_length
        )


def _validate(config: Any, file: VerlFile) -> None:
    """VeRL's own checks, which it prints about and asserts."""
    from hydra.errors import HydraException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        with contextlib.redirect_stdout(sys.stderr):
            validate_config(
                config=config,
                use_reference_policy=need_reference_policy(config),
                use_critic=need_critic(config),
            )
    except (AssertionError, ValueError, TypeError, OSError, HydraException) as error:
        raise InvalidInput(f"VeRL refuses {file.path}: {error}") from error
