"""The policy loss on token log-probabilities. Pure functions of tensors; normalisation lies in the weights.

The surrogate is PPO's clipped objective (Schulman et al. 2017, arXiv 1707.06347) with asymmetric bounds
(DAPO, arXiv 2503.14476) and the dual clip for negative advantages (Ye et al. 2020, arXiv 1912.09729), as in
VeRL's "vanilla" loss, to the last digit. KL estimators: Schulman, "Approximating KL divergence" (2020).
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .settings import KLEstimator

_MAX_LOG_RATIO = 20.0  # natural log; keeps exp() finite, as VeRL does


@dataclass(frozen=True, slots=True)
class Clip:
    """Bounds of the probability ratio: [1 - low, 1 + high], and `dual` for negative advantages."""

    low: float
    high: float
    dual: float


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Per token: the loss, whether the upper bound acted, and whether the dual clip did. Shapes [E]."""

    loss: Tensor
    clipped: Tensor
    dual_clipped: Tensor


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: Clip) -> TokenLoss:
    """The clipped surrogate of each token, negated. All shapes [E]; differentiable in `logprobs`."""
    ratio = _ratio(logprobs, old_logprobs)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip.low, 1 + clip.high)
    single = torch.maximum(plain, bounded)
    floor = -advantages * clip.dual
    dual = torch.minimum(floor, single)
    negative = advantages < 0
    return TokenLoss(torch.where(negative, dual, single), bounded > plain, negative & (single > floor))


def importance_weights(proximal: Tensor, sampled: Tensor, cap: float) -> Tensor:
    """min(pi_proximal / pi_sampled, cap) of each token, without a gradient. Shapes [E].

    `proximal` are the log-probabilities at the start of the update, `sampled` those that were sampled with,
    by a version some updates older. Truncated importance sampling: Ionides 2008; Yao et al., "Your efficient
    RL framework secretly brings you off-policy RL training" (2025); VeRL's `rollout_correction`.
    """
    return _ratio(proximal, sampled).clamp(max=cap).detach()


def _ratio(logprobs: Tensor, others: Tensor) -> Tensor:
    return (logprobs - others).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def kl_penalty(logprobs: Tensor, reference: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token. Shapes [E]."""
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    back = (-difference).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return (back.exp() - back - 1).clamp(-10, 10)
