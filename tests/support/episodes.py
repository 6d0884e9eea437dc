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
