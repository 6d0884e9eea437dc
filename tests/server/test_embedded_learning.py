from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.server.embedded_support import batch_of, some_tokens, tiny_engine

from agentlightning_server.engines.base import Completion, Sampling
from agentlightning_server.engines.embedded import EmbeddedEngine

GROUP = 16
STEPS = 16
PROMPTS = [some_tokens(i, 12) for i in range(4) for _ in range(GROUP)]


def share_of_low_tokens(tokens: Sequence[int]) -> float:
    """The reward: the share of tokens in the lower half of the vocabulary, 0.5 by chance."""
    return float(np.mean(np.array(tokens) < 131))


async def rollouts(engine: EmbeddedEngine, step: int) -> list[Completion]:
    calls = [
        engine.generate(prompt, Sampling(8, seed=step * len(PROMPTS) + i), "policy")
        for i, prompt in enumerate(PROMPTS)
    ]
    return await asyncio.gather(*calls)


def rewards_while_training(engine: EmbeddedEngine, *, blind: bool = False) -> list[float]:
    """Mean reward per step, learning from groups or by the critic; `blind` shuffles who earned what."""
    rng = np.random.default_rng(0)
    history: list[float] = []
    for step in range(STEPS):
        completions = asyncio.run(rollouts(engine, step))
        rewards = np.array([share_of_low_tokens(c.token_ids) for c in completions]).reshape(-1, GROUP)
        history.append(float(rewards.mean()))
        if blind:
            rewards = rng.permuted(rewards, axis=1)
        if engine.settings.critic:
            nothing = [0.0] * len(PROMPTS)
            engine.update(batch_of(PROMPTS, completions, nothing, rewards.ravel().tolist()))
            continue
        spread = rewards.std(1, ddof=1, keepdims=True) + 1e-6
        advantages = (rewards - rewards.mean(1, keepdims=True)) / spread
        engine.update(batch_of(PROMPTS, completions, advantages.ravel().tolist()))
    return history


FULL: dict[str, Any] = {"learning_rate": 5e-3}
ADAPTER: dict[str, Any] = {"learning_rate": 3e-2, "lora_rank": 8}
CRITIC: dict[str, Any] = {**FULL, "critic": True, "critic_learning_rate": 1e-2, "gae_lambda": 0.95}


@pytest.mark.parametrize(("settings", "reached"), [(FULL, 0.85), (ADAPTER, 0.68), (CRITIC, 0.85)])
def test_the_reward_of_a_random_model_rises(tmp_path: Path, settings: dict[str, Any], reached: float) -> None:
    engine = tiny_engine(tmp_path / "model", **settings)
    history = rewards_while_training(engine)
    engine.close()
    assert history[0] < 0.6
    assert np.mean(history[-3:]) > reached


@pytest.mark.parametrize("settings", [FULL, CRITIC])
def test_rewards_given_to_the_wrong_completions_teach_nothing(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    engine = tiny_engine(tmp_path / "model", **settings)
    history = rewards_while_training(engine, blind=True)
    engine.close()
    assert np.mean(history[-3:]) < 0.65
