"""The weights: what is trained, what is served, and what neither touches.

    base weights --(LoRA adapter | full weights)--> trained model --publish()--> served model

With full weights the served model is the trained one, and there is one policy. Adapters are one for each
policy, on one base; each is served merged into a copy that `publish` brings up to date, so that decoding
costs what it costs without an adapter, and merging never rounds the base.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
import copy
import re
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


def load_policies(model: PreTrainedModel, settings: EmbeddedSettings) -> dict[str, PolicyWeights]:
    """Take over the model, and give each of the settings' policies its weights.

    Raises InvalidInput when its attention cannot be served.
    """
    device = loading.choose_device(settings)
    attention.install(model)
    model.to(device)  # pyright: ignore[reportArgumentType, reportCallIssue] - transformers' own overload
    if not settings.lora_rank:
        reference = copy.deepcopy(model).requires_grad_(False) if settings.kl_coefficient else None
        return {settings.policy: PolicyWeights(settings.policy, model, model, reference=reference)}
    served = {name: copy.deepcopy(model).requires_grad_(False) for name in settings.policies}
    adapters = _adapt(model, settings)
    return {name: PolicyWeights(name, model, served[name], adapters=adapters) for name in settings.policies}


def _adapt(model: PreTrainedModel, settings: EmbeddedSettings) -> Any:
    """Put an adapter for each policy on all linear layers. They start alike, as the base model."""
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,  # pyright: ignore[reportArgumentType]
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    first, *others = settings.policies
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name on its way out
        torch.manual_seed(settings.seed)
        adapted = get_peft_model(model, config, adapter_name=first)
        for name in others:
            adapted.add_adapter(name, config)
        return adapted


class PolicyWeights:
    """One policy's models. `model` is trained, and shared with other policies' adapters; `served` is not."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        served: PreTrainedModel,
        *,
        adapters: Any = None,
        reference: Any = None,
    ) -> None:
        self.name = name
        self.model: Any = model
        self.served: Any = served
        self._peft = adapters
        self._reference = reference
        self.publish()

    @property
    def device(self) -> torch.device:
        return self.served.device

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the model that learn."""
        return [parameter for _, parameter in self._named_parameters()]

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        named = self.model.named_parameters()
        if self._peft is None:
            return [(name, parameter) for name, parameter in named if parameter.requires_grad]
        mine = re.compile(rf"\.lora_[A-Za-z_]+\.{self.name}\b")
        return [(name, parameter) for name, parameter in named if mine.search(name)]

    def activate(self) -> None:
        """Make passes of `model` those of this policy, with gradients for its parameters alone."""
        if self._peft is not None:
            self._peft.set_adapter(self.name)

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
                merged = layer.get_base_layer().weight + layer.get_delta_weight(self.name)
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
        return {name: parameter.detach() for name, parameter in self._named_parameters()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set what learns, and publish it. Raises KeyError when a tensor is missing."""
        for name, value in self.trainable_state().items():
            value.copy_(state[name])
        self.publish()

    def export(self, folder: Path) -> None:
        """Save the adapter where one is trained, else the whole model."""
        if self._peft is None:
            self.model.save_pretrained(folder)
            return
        self._peft.save_pretrained(folder, selected_adapters=[self.name])
        inner = folder / self.name  # where peft puts adapters that are not called "default"
        if inner.is_dir():
            for file in inner.iterdir():
                file.rename(folder / file.name)
            inner.rmdir()
