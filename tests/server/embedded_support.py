"""What the tests of the embedded engine share: tiny engines, batches from completions, a plain reference."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from agentlightning.types import Batch
from agentlightning_server.engines.base import Completion, Sampling
from agentlightning_server.engines.embedded import EmbeddedEngine, EmbeddedSettings
from agentlightning_server.engines.embedded.tiny import make_tiny_model

VOCABULARY = 259


def tiny_engine(folder: Path, **settings: Any) -> EmbeddedEngine:
    """An engine on a tiny model in `folder`, made when it is not there."""
    if not (folder / "config.json").exists():
        make_tiny_model(folder)
    defaults: dict[str, Any] = {"model": str(folder), "threads": 1, "context_length": 512}
    return EmbeddedEngine(EmbeddedSettings(**(defaults | settings)))


def plain_model(folder: Path | str) -> Any:
    """The same model as transformers runs it by itself."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def some_tokens(seed: int, count: int) -> list[int]:
    """Arbitrary ordinary tokens."""
    rng = random.Random(seed)
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


async def sample_all(
    engine: EmbeddedEngine, prompts: Sequence[Sequence[int]], **sampling: Any
) -> list[Completion]:
    """One completion per prompt, asked for together; the i-th with seed i unless one is given."""
    options: list[dict[str, Any]] = [{"max_tokens": 12, "seed": i} | sampling for i in range(len(prompts))]
    calls = [engine.generate(p, Sampling(**o), "policy") for p, o in zip(prompts, options, strict=True)]
    return await asyncio.gather(*calls)


def sampled(engine: EmbeddedEngine, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Completion]:
    return asyncio.run(sample_all(engine, prompts, **sampling))


def plain_logprobs(
    model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """Log-probabilities of a response as transformers alone computes them."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


Piece = tuple[Sequence[int], Sequence[int], Sequence[float]]
"""(context, response, log-probabilities of the response)"""


def make_batch(
    rows: Sequence[Sequence[Piece]],
    advantages: Sequence[float],
    *,
    temperatures: Sequence[float] | None = None,
) -> Batch:
    """One episode per row, its pieces end to end; every response token weighs the same."""
    ids: list[int] = []
    mask: list[bool] = []
    old: list[float] = []
    index: list[int] = []
    advantage: list[float] = []
    temperature: list[float] = []
    offsets, transition_episode = [0], list[int]()
    for r, pieces in enumerate(rows):
        for context, response, logprobs in pieces:
            n, m = len(context), len(response)
            ids += [*context, *response]
            mask += [False] * n + [True] * m
            old += [0.0] * n + list(logprobs)
            index += [-1] * n + [len(transition_episode)] * m
            advantage += [0.0] * n + [advantages[r]] * m
            temperature += [1.0] * n + [temperatures[r] if temperatures else 1.0] * m
            transition_episode.append(r)
        offsets.append(len(ids))
    responses = np.array(mask)
    return Batch(
        token_ids=np.array(ids, dtype=np.int32),
        row_offsets=np.array(offsets, dtype=np.int32),
        response_mask=responses,
        old_logprobs=np.array(old, dtype=np.float32),
        advantages=np.array(advantage, dtype=np.float32),
        rewards=np.zeros(len(ids), dtype=np.float32),
        weights=np.where(responses, 1 / responses.sum(), 0).astype(np.float32),
        temperatures=np.array(temperature, dtype=np.float32),
        transition_index=np.array(index, dtype=np.int32),
        transition_episode=np.array(transition_episode, dtype=np.int32),
        episode_group=np.zeros(len(rows), dtype=np.int32),
        policy_versions=np.zeros(len(transition_episode), dtype=np.int32),
        policy="policy",
        transitions=len(transition_episode),
        episodes=len(rows),
        unmerged_tokens=len(ids),
    )


def batch_of(
    prompts: Sequence[Sequence[int]], completions: Sequence[Completion], advantages: Sequence[float]
) -> Batch:
    """A batch of one call per row."""
    rows = [[(p, c.token_ids, c.logprobs)] for p, c in zip(prompts, completions, strict=True)]
    return make_batch(rows, advantages)
