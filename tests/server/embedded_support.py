"""What the tests of the embedded engine share: tiny engines, batches of completions, plain references."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from agentlightning.types import Batch
from agentlightning_server.engines.base import Completion, Sampling
from agentlightning_server.engines.embedded import EmbeddedEngine, EmbeddedSettings
from agentlightning_server.engines.embedded.loading import load_model
from agentlightning_server.engines.embedded.policy import load_policies
from agentlightning_server.engines.embedded.tiny import make_tiny_model
from agentlightning_server.engines.embedded.updates import Updater

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
    rewards: Sequence[float] | None = None,
) -> Batch:
    """One episode per row, its pieces end to end; every response token weighs the same, and the last one of
    a row earns its reward."""
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
    earned = np.zeros(len(ids), dtype=np.float32)
    earned[np.array(offsets[1:]) - 1] = 0.0 if rewards is None else rewards
    return Batch(
        token_ids=np.array(ids, dtype=np.int32),
        row_offsets=np.array(offsets, dtype=np.int32),
        response_mask=responses,
        old_logprobs=np.array(old, dtype=np.float32),
        advantages=np.array(advantage, dtype=np.float32),
        rewards=earned,
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
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    advantages: Sequence[float],
    rewards: Sequence[float] | None = None,
) -> Batch:
    """A batch of one call per row."""
    rows = [[(p, c.token_ids, c.logprobs)] for p, c in zip(prompts, completions, strict=True)]
    return make_batch(rows, advantages, rewards=rewards)


# --- gradients, as the engine computes them and as transformers alone does -------------------------

ADVANTAGES = [1.0, -0.5, 0.25, -1.5, 2.0, 0.5, -1.0, 0.75, -0.25]
"""For the nine rows of `two_calls_each`."""


def old_logprobs(seed: int, response: Sequence[int]) -> list[float]:
    """Of some other policy, far enough away for every kind of clipping."""
    return (-8 * np.random.default_rng(seed).random(len(response))).tolist()


def two_calls_each(groups: int = 3, size: int = 3, system: int = 60) -> list[list[Piece]]:
    """Episodes of two calls: a long common prefix, a prompt per group, responses that start alike."""
    rows: list[list[Piece]] = []
    for g in range(groups):
        prompt = some_tokens(0, system) + some_tokens(100 + g, 12)
        for i in range(size):
            seed = 10 * g + i
            first = some_tokens(200 + g, 4) + some_tokens(300 + seed, 5)
            second = some_tokens(400 + seed, 6)
            rows.append(
                [
                    (prompt, first, old_logprobs(seed, first)),
                    (some_tokens(500 + seed, 5), second, old_logprobs(seed + 50, second)),
                ]
            )
    return rows


def unmerged(rows: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """The same calls, each a row of its own."""
    separate: list[list[Piece]] = []
    for pieces in rows:
        history: list[int] = []
        for context, response, logprobs in pieces:
            separate.append([([*history, *context], response, logprobs)])
            history += [*context, *response]
    return separate


def updater_of(folder: Path, **settings: Any) -> Updater:
    """What an engine on the model in `folder` would train with, its gradient never clipped."""
    values: dict[str, Any] = {"max_grad_norm": 1e9, **settings}
    options = EmbeddedSettings(model=str(folder), **values)
    return Updater(load_policies(load_model(str(folder)).model, options)["policy"], options)


def gradients(updater: Updater, batch: Batch) -> list[Tensor]:
    """The policy's gradient at each optimiser step of an update."""
    kept: list[Tensor] = []

    def keep(*_: Any) -> None:
        policy = updater.optimizer.param_groups[0]["params"]
        kept.append(torch.cat([p.grad.flatten() for p in policy if p.grad is not None]))

    updater.optimizer.register_step_pre_hook(keep)
    updater.update(batch)
    return kept


def packed_gradient(folder: Path, batch: Batch, **settings: Any) -> Tensor:
    """The gradient that an update of one step computes."""
    (gradient,) = gradients(updater_of(folder, **settings), batch)
    return gradient


Surrogate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(log-probabilities, those at sampling, advantages) -> what is to be maximised, per token"""


def clipped(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """PPO's surrogate with the default bounds."""
    ratio = (logprobs - old).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    return torch.where(advantages < 0, torch.max(surrogate, 3 * advantages), surrogate)


def accumulate(model: Any, batch: Batch, surrogate: Surrogate = clipped) -> None:
    """Add the gradient of a batch, a row at a time, with the loss written out."""
    for row in range(batch.rows):
        part = slice(int(batch.row_offsets[row]), int(batch.row_offsets[row + 1]))
        ids = torch.tensor(batch.token_ids[part].tolist())
        picked = torch.from_numpy(batch.response_mask[part])[1:]
        temperature = torch.from_numpy(batch.temperatures[part])[1:, None]
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1] / temperature, -1)
        logprobs = logprobs.gather(1, ids[1:, None])[:, 0]
        old, advantages, weights = (
            torch.from_numpy(column[part])[1:]
            for column in (batch.old_logprobs, batch.advantages, batch.weights)
        )
        (-(weights * surrogate(logprobs, old, advantages))[picked].sum()).backward()


def plain_gradient(folder: Path, batch: Batch, surrogate: Surrogate = clipped) -> Tensor:
    """The gradient by transformers alone."""
    model = plain_model(folder)
    accumulate(model, batch, surrogate)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
