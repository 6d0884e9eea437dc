"""Every knob of the embedded engine, in one frozen dataclass. Importing this does not import torch.

There is none for the number format: weights and products are float32. A bfloat16 copy of the weights cannot
hold an update smaller than the distance between its neighbouring numbers, which is probably why it learned
little: from 0.11, two updates at 2e-5 on SmolLM2-135M brought the share of valid tool calls to 0.23, and in
float32 to 0.67 (one run each, 64 problems).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from agentlightning.errors import InvalidInput

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, slots=True)
class EmbeddedSettings:
    """What to serve and how to train it. The defaults suit a 100-million-parameter model on a laptop."""

    model: str = DEFAULT_MODEL
    """A local Hugging Face folder or a hub id."""
    policies: tuple[str, ...] = ("policy",)
    """Names under which the trained models are asked for. Several are LoRA adapters on one base model, each
    with an optimiser and a version of its own."""
    device: str = "auto"
    """"cpu", "cuda", ...; "auto" takes a GPU when there is one."""
    threads: int | None = None
    """Threads of a CPU's matrix products; None leaves torch's choice, the number of cores."""
    seed: int = 0
    """Seeds the sampling of requests that bring no seed, and the initial LoRA weights."""

    context_length: int = 4096
    """Most tokens of prompt and response together; the model's own limit where that is smaller."""
    slots: int = 64
    """Most completions decoded at the same time; further ones wait in the queue."""
    cache_tokens: int = 65_536
    """Most tokens whose keys and values the slots hold together, shared prefixes aside (46 KB each on
    SmolLM2-135M in float32). Memory grows as it is needed; long requests run fewer at a time."""
    queue_size: int = 1024
    """Requests that may wait for a slot before callers are told to come back later."""
    gather_s: float = 0.003
    """How long an idle engine waits after a request for others that arrive with it, 20 times at most."""
    prefill_tokens: int = 1024
    """Prompt tokens computed in one forward pass."""

    lora_rank: int = 0
    """Rank of the trained low-rank adapter on all linear layers; 0 trains the full weights."""
    lora_alpha: float | None = None
    """Scale of the adapter; None is twice the rank."""
    learning_rate: float = 1e-5
    warmup_updates: int = 0
    """Updates over which the learning rate rises linearly to its value."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    """Bound on the loss of a token with a negative advantage, in units of its advantage."""
    epochs: int = 1
    """Passes of an update over its batch."""
    minibatches: int = 1
    """Optimiser steps of one pass, each on a share of the batch's rows. While an update of several steps runs
    it keeps a copy of weights and optimiser, to go back to should one diverge."""
    importance_cap: float | None = None
    """Truncated importance sampling for rollouts that are some versions old: the loss is clipped around the
    policy at the start of the update and weighted by how much likelier that makes a token than the version
    that sampled it, at most by this (2, say). None clips around the version that sampled."""
    critic: bool = False
    """Estimate advantages by GAE with a value head (PPO) instead of by comparing the rollouts of a group; one
    rollout per task is then enough."""
    critic_learning_rate: float = 1e-3
    value_clip: float = 0.5
    gamma: float = 1.0
    """Discount per token, for the critic."""
    gae_lambda: float = 1.0
    kl_coefficient: float = 0.0
    """Weight of a penalty on leaving the base model; above 0 on full weights this keeps a second copy."""
    kl_estimator: KLEstimator = "k3"
    pack_tokens: int = 512
    """Tokens of one training forward and backward pass, a shared prefix aside; bounds its memory. Attention
    over a chunk grows with its square, matrix products gain little above this."""

    @property
    def policy(self) -> str:
        """The default policy, the first."""
        return self.policies[0]

    def __post_init__(self) -> None:
        counts = (
            "slots",
            "context_length",
            "queue_size",
            "prefill_tokens",
            "pack_tokens",
            "epochs",
            "minibatches",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.cache_tokens < self.context_length:
            raise InvalidInput(
                f"cache_tokens ({self.cache_tokens}) must hold at least one request of context_length "
                f"({self.context_length}) tokens: raise it or lower context_length"
            )
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise InvalidInput(f"policies must be one name or several different ones, got {self.policies}")
        for name in self.policies:
            if not _NAME.fullmatch(name):
                raise InvalidInput(f"a policy's name has letters, digits, _ and - only, got {name!r}")
        if len(self.policies) > 1 and not self.lora_rank:
            raise InvalidInput(
                f"{len(self.policies)} policies ({', '.join(self.policies)}) share one base model as LoRA "
                "adapters: give a lora_rank, 16 say"
            )
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise InvalidInput(f"importance_cap must be above zero, or None, got {self.importance_cap}")
        if self.lora_rank < 0:
            raise InvalidInput(f"lora_rank must be 0 (full weights) or positive, got {self.lora_rank}")
