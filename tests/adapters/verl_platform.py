"""A CPU as a platform of verl, which verl itself imports through VERL_USE_EXTERNAL_MODULES."""

import types
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry
from verl.utils import distributed


def _nothing(*_: Any, **__: Any) -> None: ...


def _zero(*_: Any, **__: Any) -> int:
    return 0


MODULE = types.SimpleNamespace(
    max_memory_allocated=_zero,
    max_memory_reserved=_zero,
    memory_allocated=_zero,
    memory_reserved=_zero,
    mem_get_info=lambda *_: (0, 0),
    current_device=lambda *_: "cpu",
    device_count=lambda *_: 1,
    get_device_name=lambda *_: "cpu",
    is_available=lambda *_: True,
    set_device=_nothing,
    synchronize=_nothing,
    empty_cache=_nothing,
    ipc_collect=_nothing,
    manual_seed=_nothing,
    manual_seed_all=_nothing,
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
)


@PlatformRegistry.register("cpu")
class PlatformCPU(PlatformBase):
    """Every accelerator call of verl, answered by a CPU."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = MODULE
    is_available = MODULE.is_available
    current_device = MODULE.current_device
    device_count = MODULE.device_count
    set_device = MODULE.set_device
    synchronize = MODULE.synchronize
    manual_seed = MODULE.manual_seed
    manual_seed_all = MODULE.manual_seed_all
    set_allocator_settings = MODULE.empty_cache
    empty_cache = MODULE.empty_cache
    profiler_start = profiler_stop = MODULE.empty_cache
    cudart = MODULE.empty_cache

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return nullcontext()

    def ray_resource_name(self) -> str:
        return "GPU"  # as Ray is told that there is one; verl counts no other resource

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False


# verl asks torch for "cpu:gloo,DEVICE:BACKEND", which names the CPU twice.
distributed.initialize_global_process_group_ray = partial(
    distributed.initialize_global_process_group_ray, backend=PlatformCPU().communication_backend_name()
)
