"""What OpenRLHF 0.11.2 and vLLM's CPU build lack on a CPU; openrlhf_start puts it into every process of a run."""

import sys
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adapters import stand_ins
from drpo.adapters.imports import when_imported


class Device(str):
    """A CPU where a tensor is to be moved; in "cuda:N", which OpenRLHF's replay buffer names and does not use, 0."""

    def __format__(self, spec: str) -> str:
        return "0"


class OnCPU(TorchFunctionMode):
    """Tensors that are made on "cuda" are made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return function(*args, **(kwargs | {"device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))


class Group:
    """A process group of gloo in the place of NCCL's communicator, for the weights that go to the sampler."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, device: object) -> None:
        store = dist.TCPStore(address, port, world_size, is_master=rank == 0)
        self.group = dist.ProcessGroupGloo(store, rank, world_size, timedelta(minutes=60))

    def broadcast(self, tensor: Tensor, src: int, stream: None) -> None:
        self.group.broadcast(tensor, src).wait()


def mesh(module: ModuleType) -> None:
    """DeepSpeed's ranks as a mesh of CPUs."""
    on_device = module.init_device_mesh
    module.init_device_mesh = lambda _, *sizes, **names: on_device("cpu", *sizes, **names)


def group(module: ModuleType) -> None:
    module.stateless_init_process_group = Group


def worker(module: ModuleType) -> None:
    """vLLM's worker receives weights on the CPU, and keeps them.

    On a CPU vLLM multiplies by packed copies and drops the weights, so that `load_weights` has nothing to write to.
    Without these kernels it multiplies by the weights themselves, as on a GPU.
    """
    import vllm._custom_ops as ops
    from vllm.model_executor.layers import utils

    ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False
    update = module.WorkerWrap.update_weight

    def update_weight(self: Any, *named: Any, **more: Any) -> None:
        with OnCPU():
            update(self, *named, **more)

    module.WorkerWrap.update_weight = update_weight


def install() -> None:
    """In this process: an empty flash-attn, a CPU for torch's current device, and the three above once imported."""
    stand_ins.install(("flash_attn",))
    sys.modules["flash_attn.ops.triton.cross_entropy"] = None  # where it is missing, OpenRLHF scores tokens by itself
    torch.cuda.current_device = lambda: Device("cpu")
    for name in ("set_device", "synchronize", "current_stream"):
        setattr(torch.cuda, name, lambda *_: None)  # each its own: torch's compiler keeps a rule for each function
    when_imported("openrlhf.utils.deepspeed.deepspeed", mesh)
    when_imported("openrlhf.utils.distributed_util", group)
    when_imported("openrlhf.trainer.ray.vllm_worker_wrap", worker)
