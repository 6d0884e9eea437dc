"""The weights: what is trained, what is served, and what neither touches.

    base weights --(LoRA adapter | full weights)--> trained model --publish()--> served model

Trained weights are float32. Where the served model is not simply the trained one (an adapter to be merged, or
matrix products in bfloat16), it is a copy that `publish` brings up to date, so that merging never rounds the
trained weights. Both compute the same numbers up to rounding.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
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
        self.compute = loading.choose_compute(settings, self.device)
        attention.install(model)
        model.to(self.device)  # pyright: ignore[reportArgumentType, reportCallIssue] - transformers' own overload
        self._reference: Any = None
        if settings.kl_coefficient and not settings.lora_rank:
            self._reference = copy.deepcopy(model).requires_grad_(False)
        copied = settings.lora_rank > 0 or self.compute != torch.float32
        self.served: Any = copy.deepcopy(model).requires_grad_(False) if copied else model
        self._peft: Any = None
        self.model: Any = model
        if settings.lora_rank:
            self._peft = self._adapt(model, settings)
        if self.compute != torch.float32:
            self._lower(self.served)
        self.publish()

    def _adapt(self, model: PreTrainedModel, settings: EmbeddedSettings) -> Any:
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,  # pyright: ignore[reportArgumentType]
            target_modules="all-linear",
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            return get_peft_model(model, config, adapter_name=_ADAPTER)

    def _lower(self, model: nn.Module) -> None:
        """Hold the inner matrices in the format they are multiplied in. The output matrix stays float32,
        since log-probabilities are only as exact as logits."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not _is_output(name):
                module.to(self.compute)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def tunes_adapter(self) -> bool:
        return self._peft is not None

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which both models compute."""
        if self.compute == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute)

    @contextlib.contextmanager
    def reference(self) -> Iterator[Any]:
        """The base model, to measure the distance to."""
        if self._peft is None:
            yield self._reference
        else:
            with self._peft.disable_adapter():
                yield self.model

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the served model up to date with the trained one."""
        if self.served is self.model:
            return
        trained = dict(self.model.named_modules())
        for name, module in self.served.named_modules():
            source: Any = trained[name]
            if isinstance(source, LoraLayer):
                layer: Any = source
                module.weight.copy_(layer.get_base_layer().weight + layer.get_delta_weight(_ADAPTER))
            elif not self.tunes_adapter:
                for key, parameter in module.named_parameters(recurse=False):
                    parameter.copy_(getattr(source, key))

    @torch.no_grad()
    def forward(self, ids: Tensor, view: RowsView, logits: bool) -> Tensor:
        """A pass of the served model; see `decoding.Forward`."""
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": view.positions,
            "kv_view": view,
            "use_cache": False,
        }
        with self.precision():
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

    def parameter_count(self) -> int:
        return sum(math.prod(p.shape) for p in self.model.parameters())


def _is_output(name: str) -> bool:
    return name.rpartition(".")[2] in ("lm_head", "embed_out", "output")
