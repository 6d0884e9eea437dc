"""The one hook into transformers: an attention function that hands keys and values to a `KeyValueView`.

A forward pass of any transformers causal LM takes `kv_view=...`; every attention layer then gives its new
queries, keys and values to that view, which remembers them where it likes and returns what was attended to.
So the model stays transformers' own, and neither decoding nor training copies a cache it does not need.
A model with this hook installed cannot run without a view: it would silently attend to the wrong tokens.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from agentlightning.errors import InvalidInput

IMPLEMENTATION = "agentlightning"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


class KeyValueView(Protocol):
    """What one forward pass may see of the past, and where it leaves what it computed."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of `query` [B, H, T, D] over the view's past and `key`, `value` [B, G, T, D], with H a
        multiple of G. Returns [B, T, H, D]."""
        ...


def install(model: PreTrainedModel) -> None:
    """Route the model's attention through views. Raises InvalidInput for attention that a view cannot do."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    config: Any = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) is not None
    kinds = set(
        getattr(config, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"]
    )
    if kinds - {"full_attention"}:
        raise InvalidInput(
            f"the embedded engine decodes full attention only, and {config.model_type} has layers of kind "
            f"{', '.join(sorted(kinds - {'full_attention'}))}: choose another model or engine"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise InvalidInput(
            f"transformers' {type(model).__name__} has no exchangeable attention: choose another model"
        )
    model.set_attn_implementation(IMPLEMENTATION)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    kv_view: KeyValueView | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; `attention_mask` is always None, the view knows who sees whom."""
    del attention_mask
    if kv_view is None:
        raise RuntimeError(
            "this model is held by an EmbeddedEngine and runs only through it; load another copy"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise InvalidInput(
                f"the embedded engine does not support attention with {name}: choose another model"
            )
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return kv_view.attend(int(layer), query, key, value, scale), None
