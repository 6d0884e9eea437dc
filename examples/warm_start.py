"""A supervised warm start: some updates on given answers, so that reinforcement has something to reinforce.

It uses the engine's own update with every advantage 1: with the importance weights capped at 1, as the
settings below do, the gradient is that of the answers' likelihood. What is written is an ordinary checkpoint,
for `train_locally(checkpoint=...)` or `agl serve --checkpoint`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from agentlightning.learning.batching import Normalise, build_batch
from agentlightning.types import Episode, Transition
from agentlightning_server.engines.base import ChatTokenizer
from agentlightning_server.training import EmbeddedSettings
from agentlightning_server.training.local import load_engine

NEVER_SAMPLED = -1e4  # log-probability: its importance weight is always the cap


@dataclass(frozen=True, slots=True)
class Example:
    """What the policy reads, and what it should say."""

    messages: Sequence[Mapping[str, str]]
    answer: str


def warm_start(
    examples: Callable[[], Sequence[Example]],
    output: Path,
    settings: EmbeddedSettings,
    *,
    epochs: int = 2,
    per_update: int = 16,
) -> Path:
    """Train on the examples and return the checkpoint. An output folder that has one is not trained again."""
    if output.exists():
        return output
    given = examples()
    engine = load_engine(replace(settings, importance_cap=1.0))
    try:
        for epoch in range(epochs):
            order = list(given)
            random.Random(settings.seed + epoch).shuffle(order)
            for start in range(0, len(order), per_update):
                began = time.monotonic()
                part = order[start : start + per_update]
                episodes = [
                    _episode(example, engine.tokenizer, settings.policy, i) for i, example in enumerate(part)
                ]
                batch = build_batch(
                    episodes,
                    [np.ones(1, dtype=np.float32)] * len(episodes),
                    policy=settings.policy,
                    normalise=Normalise.TOKEN,
                )
                loss = engine.update(batch)["entropy"]  # mean of -log p over the answers' tokens
                done = f"{epoch * len(order) + start + len(part)}/{epochs * len(order)}"
                print(f"warm start {done}: loss {loss:.3f}  {time.monotonic() - began:.0f} s", flush=True)
        engine.save(output)
    finally:
        engine.close()
    return output


def _episode(example: Example, tokenizer: ChatTokenizer, policy: str, number: int) -> Episode:
    prompt = tokenizer.apply_chat_template(
        list(example.messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    answer = [*tokenizer.encode(example.answer, add_special_tokens=False), tokenizer.eos_token_id]
    transition = Transition(
        span_id=str(number),
        prompt_ids=np.asarray(prompt, dtype=np.int32),
        response_ids=np.asarray(answer, dtype=np.int32),
        logprobs=np.full(len(answer), NEVER_SAMPLED, dtype=np.float32),
        messages=(),
        output=None,
        agent_name=None,
        policy=policy,
        policy_version=0,
    )
    return Episode(str(number), "", str(number), None, [transition], final_reward=None)
