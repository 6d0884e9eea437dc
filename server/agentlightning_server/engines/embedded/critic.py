"""The critic: a linear value head on the policy's own last hidden states.

The hidden states are read, not trained: the value loss moves the head alone, so a poor value cannot disturb
the policy. It starts at 0, where GAE is plain reward-to-go.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import torch
from torch import Tensor, nn


class Critic(nn.Module):
    """The value of the state before a token, from the hidden state that predicts it."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        super().__init__()
        self.head = nn.Linear(hidden_size, 1, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[E, H] -> [E]."""
        return self.head(hidden.detach().float())[:, 0]


def value_loss(values: Tensor, old: Tensor, targets: Tensor, clip: float) -> Tensor:
    """Half the squared error of each value, the larger of plain and clipped. Shapes [E].

    The clip keeps a value within `clip` of what it was before the update. Source: PPO's reference
    implementation (Dhariwal et al., OpenAI baselines); VeRL's `compute_value_loss`.
    """
    bounded = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - targets).square(), (bounded - targets).square())
