"""The weights: what is trained, what is served, and what neither touches.

    base weights --(LoRA adapter | full weights)--> trained model --publish()--> served model

With full weights the served model is the trained one. An adapter is served merged into a copy that `publish`
brings up to date, so that decoding costs what it costs without an adapter, and merging never rounds the base.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import attention, loading
from .cache import RowsView
from .settings import EmbeddedSettings

_ADAPTER = "default"


class PolicyWeights:
    """One policy's models. `model` is trained; `parameters` are those of it that learn."""

    def __init__(self, model: PreTrainedModel, settings: EmbeddedSettings) -> None:
        """Take over the model. Raises InvalidInput when its attention cannot be served."""
        self.device = loading.choose_device(settings)
        attention.install(model)
        model.to(self.device)  # pyright: ignore[reportArgumentType, reportCallIssue] - transformers' own overload
        self._reference: Any = None
        if settings.kl_coefficient and not settings.lora_rank:
            self._reference = copy.deepcopy(model).requires_grad_(False)
        self.served: Any = copy.deepcopy(model).requires_grad_(False) if settings.lora_rank else model
        self._peft: Any = None
        self.model: Any = model
        if settings.lora_rank:
            self._peft = self._adapt(model, settings)
        self.publish()

    def _adapt(self, model: PreTrainedModel, settings: EmbeddedSettings) -> Any:
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,  # pyright: ignore[reportArgumentType]
            target_modules="all-linear",
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name on its way out
            torch.manual_seed(settings.seed)
            return get_peft_model(model, config, adapter_name=_ADAPTER)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def tunes_adapter(self) -> bool:
        return self._peft is not None

    @contextlib.contextmanager
    def reference(self) -> Generator[Any]:
        """The base model, to measure the distance to."""
        if self._peft is None:
            yield self._reference
        else:
            with self._peft.disable_adapter():
                yield self.model

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the served model up to date with the trained one."""
        if self._peft is None:
            return
        trained = dict(self.model.named_modules())
        for name, module in self.served.named_modules():
            layer: Any = trained[name]
            if hasattr(layer, "get_delta_weight"):
                merged = layer.get_base_layer().weight + layer.get_delta_weight(_ADAPTER)
                module.weight.copy_(merged)

    @torch.no_grad()
    def forward(self, ids: Tensor, view: RowsView, logits: bool) -> Tensor:
        """A pass of the served model; see `decoding.Forward`."""
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": view.positions,
            "kv_view": view,
            "use_cache": False,
        }
        if not logits:
            return self.served.base_model(**inputs).last_hidden_state
        return self.served(**inputs, logits_to_keep=1).logits[:, -1]

    def trainable_state(self) -> dict[str, Tensor]:
        """Names and values of what learns; values are the live tensors."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set what learns, and publish it. Raises KeyError when a tensor is missing."""
        for name, value in self.trainable_state().items():
            value.copy_(state[name])
        self.publish()

    def export(self, folder: Path) -> None:
        """Save the adapter where one is trained, else the whole model."""
        (self._peft or self.model).save_pretrained(folder)
