"""The processes of one run: ranks, the sharding of work, and collectives."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drpo.errors import EngineError, InputError, Interrupted

T = TypeVar("T")

TIMEOUT = timedelta(hours=3)
"""The timeout of a collective; another rank may be evaluating or waiting for a server."""


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes that train together.

    Every rank must call the same methods in the same order. Gradients are summed once per update; all other exchanged
    data is small (episodes, rewards, metrics).

    Args:
        rank: this process's number, from 0.
        size: number of processes.
        engines: number of processes with a rollout engine, the first ones; None means all.

    Example:
        >>> SINGLE_PROCESS.shard([1, 2, 3]), SINGLE_PROCESS.gather([4, 5]), Ranks(1, 2).shard([1, 2, 3])
        ([1, 2, 3], [4, 5], [2, 3])
    """

    rank: int = 0
    size: int = 1
    engines: int | None = None

    @property
    def is_main(self) -> bool:
        """True for rank 0, which writes the files."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """Return this rank's shard of what the engines sample, in `gather`'s order; empty without an engine."""
        n, engines = len(items), self.engines or self.size
        return list(items[n * self.rank // engines : n * (self.rank + 1) // engines])

    def gather(self, items: Sequence[T]) -> list[T]:
        """Return the items of all ranks, in the order of ranks."""
        if self.size == 1:
            return list(items)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def all_reduce_sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""
        if self.size > 1:
            waiting = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in waiting:
                work.wait()

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each parameter's gradient by its sum over the ranks; a missing gradient counts as zero."""
        gradients = []
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
        self.all_reduce_sum(gradients)

    @contextmanager
    def reraise_on_all(self) -> Iterator[None]:
        """Re-raise one rank's exception on all ranks; no collectives inside.

        Otherwise the other ranks would wait for the failed one, and finished work could not be saved.

        Raises:
            InputError, EngineError, Interrupted: another rank raised it; the message names the rank.
            RuntimeError: another rank raised something else.
        """
        local: Exception | Interrupted | None = None
        try:
            yield
        except (Exception, Interrupted) as error:  # raised again below, after the collective
            local = error
        known = next((kind for kind in (InputError, EngineError, Interrupted) if isinstance(local, kind)), RuntimeError)
        errors = self.gather([] if local is None else [(known, f"rank {self.rank}: {local or repr(local)}")])
        if local is not None:
            raise local
        if errors:
            kind, message = errors[0]
            raise kind(message)

    def all_reduce_max(self, value: int) -> int:
        """Return the largest value of all ranks."""
        return max(self.gather([value]))

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            dist.barrier()


SINGLE_PROCESS = Ranks()


def is_distributed() -> bool:
    """True in a process that torchrun or accelerate started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_elastic() -> bool:
    """True where torchrun or accelerate restarts the command after a failure (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def select_device() -> None:
    """Make only this process's GPU visible; call before any use of CUDA.

    Code for one device then runs unchanged in every process.
    """
    if not is_distributed() or "DRPO_DEVICE_CHOSEN" in os.environ:
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(i) for i in range(local + 1)]
    if visible and local >= len(devices):
        raise InputError(
            f"CUDA_VISIBLE_DEVICES={visible!r}: {len(devices)} devices for LOCAL_RANK={local}; start as many processes "
            "a node as there are devices"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local]
    os.environ["DRPO_DEVICE_CHOSEN"] = "1"


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Initialise torch.distributed from torchrun's environment; destroy the process group at the end.

    Raises:
        InputError: the launcher restarts processes in a way in which they cannot find each other.
    """
    if not is_distributed():
        yield SINGLE_PROCESS
        return
    if is_elastic() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # https://github.com/pytorch/pytorch/issues/135712: the store keeps the addresses of the failed processes.
        raise InputError(
            "--max-restarts: the launcher keeps one store for all attempts, in which processes that are started again "
            "find the addresses of the dead; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it, and --rdzv-backend c10d"
        )
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
