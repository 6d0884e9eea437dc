"""Our advantages and loss in VeRL's registries, so that its own trainer learns as the embedded engine does.

VeRL's GRPO reads one number per rollout. Ours were computed where a group was complete (`rows`), travel in
the rows, and are fetched here by each row's key, which stands in its `uid`. Weights (an episode counts once,
whatever its number of calls) are multiplied in; `agentlightning` as `policy_loss.loss_mode` then adds the
tokens' losses up. This module is imported in every process of VeRL, by VERL_USE_EXTERNAL_MODULES.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_adv_est, register_policy_loss

from agentlightning.learning.batching import Normalise
from agentlightning_server.verl.names import LOSS, estimator_name
from agentlightning_server.verl.rows import weighted

ADVANTAGES: Final = "agentlightning_advantages"
"""Field of a row: its advantages [R], neither weighted nor whitened."""
PARTITION: Final = "train"

Fetch = Callable[[Sequence[str]], Sequence[Any]]


def fetch_advantages(keys: Sequence[str]) -> Sequence[Any]:
    """The advantages of these rows, a tensor each, as the bridge put them into the TransferQueue."""
    import transfer_queue as tq

    found = tq.kv_batch_get(keys=list(keys), partition_id=PARTITION, select_fields=[ADVANTAGES])
    return list(found[ADVANTAGES])


def spread(
    response_mask: torch.Tensor,
    keys: Sequence[str],
    normalise: Normalise,
    *,
    fetch: Fetch,
    whitens: bool = False,
) -> torch.Tensor:
    """Advantages times weights times rows, [rows, longest response], as `policy_loss` expects them.

    Rows without a sampled token are VeRL's padding, whose keys name nothing.
    """
    mask = response_mask.bool().cpu().numpy()
    real = [i for i in range(len(mask)) if mask[i].any()]
    lengths = [int(np.flatnonzero(mask[i])[-1]) + 1 for i in real]
    found = [np.asarray(own.float().cpu()) for own in fetch([str(keys[i]) for i in real])]
    values = weighted(
        [own[:length] for own, length in zip(found, lengths, strict=True)],
        [mask[i, :length] for i, length in zip(real, lengths, strict=True)],
        [str(keys[i]).rsplit("_", 1)[0] for i in real],
        normalise,
        whitens=whitens,
    )
    result = torch.zeros(response_mask.shape, dtype=torch.float32, device=response_mask.device)
    for i, own in zip(real, values, strict=True):
        result[i, : len(own)] = torch.from_numpy(own * len(mask))
    return result


def _register(normalise: Normalise, whitens: bool) -> None:
    def estimate(
        token_level_rewards: torch.Tensor,  # noqa: ARG001 (VeRL passes it)
        response_mask: torch.Tensor,
        index: Any,
        config: Any = None,  # noqa: ARG001
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        advantages = spread(response_mask, list(index), normalise, fetch=fetch_advantages, whitens=whitens)
        return advantages, advantages

    register_adv_est(estimator_name(normalise, whitens=whitens))(estimate)


for _normalise in Normalise:
    for _whitens in (False, True):
        _register(_normalise, _whitens)


@register_policy_loss(LOSS)
def policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",  # noqa: ARG001 (holds for KL and entropy only)
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """VeRL's clipped loss, added up over tokens and divided by the minibatch's rows.

    `spread` multiplied by the rows of the batch, so a minibatch's step weighs as much as one on the whole.
    """
    return get_policy_loss_fn("vanilla")(
        old_log_prob=old_log_prob,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=response_mask,
        loss_agg_mode="seq-mean-token-sum",
        config=config,
        rollout_is_weights=rollout_is_weights,
    )
