"""Transitions and episodes made by hand, for tests of what is learned from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from agentlightning.types import Episode, Transition


def transition(prompt: Sequence[int], response: Sequence[int], **changes: object) -> Transition:
    """A call of the policy with these token ids."""
    made = Transition(
        span_id="s",
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
        logprobs=np.full(len(response), -0.5, dtype=np.float32),
        messages=(),
        output=None,
        agent_name="agent",
        policy="policy",
        policy_version=0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def episode(*transitions: Transition, final: float | None = 1.0, group: str = "g") -> Episode:
    """An episode of these calls."""
    return Episode("r", "a", group, "t", list(transitions), final)


def conversation(rng: np.random.Generator, group: str, final: float, number: int = 0) -> Episode:
    """One to four calls that continue each other, each with an intermediate reward."""
    history: list[int] = []
    calls: list[Transition] = []
    for _ in range(rng.integers(1, 5)):
        prompt = [*history, *rng.integers(0, 99, rng.integers(1, 5)).tolist()]
        response = rng.integers(0, 99, rng.integers(1, 7)).tolist()
        calls.append(transition(prompt, response, reward=float(rng.normal() / 4)))
        history = [*prompt, *response]
    return replace(episode(*calls, final=final, group=group), rollout_id=f"{group}.{number}")


def played(seed: int, groups: int = 4) -> list[Episode]:
    """Groups of two to five episodes."""
    rng = np.random.default_rng(seed)
    return [
        conversation(rng, str(group), float(rng.normal()), number)
        for group in range(groups)
        for number in range(rng.integers(2, 6))
    ]
