"""VeRL's platform plugin for machines without an accelerator, loaded by VERL_USE_EXTERNAL_MODULES.

VeRL asks a platform for its device, its memory and its collectives. Here tensors live in memory, collectives
are gloo's, weights reach vLLM through shared memory, and Ray's "GPU" is a number that the run declares.
Chosen by VERL_PLATFORM=cpu; VERL_ENGINE_DEVICE=cuda then picks VeRL's FSDP engine, which has no entry for a
CPU.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false
from __future__ import annotations

import functools
import os
import types
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class _Device(str):
    """ "cpu" wherever a device is expected, 0 inside f"{name}:{index}": VeRL uses one value for both."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return "0"


CPU = _Device("cpu")


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _resident(*_: Any, **__: Any) -> int:
    return psutil.Process().memory_info().rss


def _random_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _name(*_: Any, **__: Any) -> str:
    return "cpu"


def _free_and_total(*_: Any, **__: Any) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


class _DeviceModule(types.ModuleType):
    """What `torch.cuda` is elsewhere; whatever is not overridden below is `torch.cpu`'s."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


def _device_module() -> types.ModuleType:
    module = _DeviceModule("agentlightning_cpu_device")
    ignored = ("empty_cache", "synchronize", "ipc_collect", "set_device", "reset_peak_memory_stats")
    ignored += ("manual_seed", "manual_seed_all", "set_rng_state")
    memory = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    for name in ignored:
        setattr(module, name, _nothing)
    for name in memory:
        setattr(module, name, _resident)
    vars(module).update(
        mem_get_info=_free_and_total,
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: CPU,
        get_rng_state=_random_state,
        get_device_name=_name,
    )
    return module


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """The answers of a machine without an accelerator."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:  # noqa: ARG002
        return chosen()

    def current_device(self) -> str:
        return CPU

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: Any) -> None: ...
    def synchronize(self, device_index: Any = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...
    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:  # noqa: ARG002
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Generator[None]:  # noqa: ARG002
        yield

    def profiler_start(self) -> None: ...
    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None: ...


def chosen() -> bool:
    """Whether this process is to run on the CPU."""
    return os.environ.get("VERL_PLATFORM", "").lower() == "cpu"


def _once_per_device(init: Any) -> Any:
    """VeRL names a backend for the CPU and one for its device, the same here, which torch refuses."""

    @functools.wraps(init)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return init("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    return init_process_group


if chosen():
    torch.distributed.init_process_group = _once_per_device(torch.distributed.init_process_group)
