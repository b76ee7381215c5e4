"""The processes of one run: who they are, how they share work out, and what they tell one another."""

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

PATIENCE = timedelta(hours=3)
"""How long a rank waits for the others; one may be evaluating or waiting for a server."""


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes that train together; alone where there is one.

    What they exchange is small (completions, scores, figures) but for gradients, of which there is one sum an update.
    Every rank must call the same methods in the same order.

    Args:
        rank: which of them this is, from 0.
        size: how many there are.
        engines: how many of them, the first ones, have an engine that samples; None for all.

    Example:
        >>> ALONE.share([1, 2, 3]), ALONE.gather([4, 5]), Ranks(1, 2).share([1, 2, 3])
        ([1, 2, 3], [4, 5], [2, 3])
    """

    rank: int = 0
    size: int = 1
    engines: int | None = None

    @property
    def first(self) -> bool:
        """True for the one that writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this rank's share of a list, the next of `gather`'s order."""
        return list(items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size])

    def draws(self, items: Sequence[T]) -> list[T]:
        """Return the share of a list that this rank's engine works on, in `gather`'s order; none without an engine."""
        return Ranks(self.rank, self.engines or self.size).share(items)

    def gather(self, items: Sequence[T]) -> list[T]:
        """Return what all ranks brought, in the order of ranks."""
        if self.size == 1:
            return list(items)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""
        if self.size > 1:
            waiting = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in waiting:
                work.wait()

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each parameter's gradient by its sum over the ranks; one that has none counts as zero."""
        gradients = []
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
        self.add(gradients)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise on every rank what one of them raises inside, where ranks must not talk to one another.

        Otherwise the rest would wait for one that has left, and what is done could not be saved.

        Raises:
            InputError, EngineError, Interrupted: another rank did; it says which.
            RuntimeError: another rank failed in another way.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:  # whatever it is, it is raised below
            own = error
        known = next((kind for kind in (InputError, EngineError, Interrupted) if isinstance(own, kind)), RuntimeError)
        found = self.gather([] if own is None else [(known, f"rank {self.rank}: {own or repr(own)}")])
        if own is not None:
            raise own
        if found:
            kind, what = found[0]
            raise kind(what)

    def most(self, value: int) -> int:
        """Return the largest of the values that the ranks bring."""
        return max(self.gather([value]))

    def meet(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


ALONE = Ranks()


def launched() -> bool:
    """True in a process that torchrun or accelerate started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def supervised() -> bool:
    """True where torchrun or accelerate would start the same command again after a failure (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def see_one_device() -> None:
    """Let this process see its own GPU alone, before anything touches CUDA.

    All that is written for one device then works unchanged in each of them.
    """
    if not launched() or "DRPO_DEVICE_CHOSEN" in os.environ:
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
def joined() -> Iterator[Ranks]:
    """Join the other processes of the run, as torchrun's environment says, and leave them at the end.

    Raises:
        InputError: processes that are started again would not find one another.
    """
    if not launched():
        yield ALONE
        return
    if supervised() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # https://github.com/pytorch/pytorch/issues/135712: the store still has the addresses of those that failed.
        raise InputError(
            "--max-restarts: the launcher keeps one store for all attempts, in which processes that are started again "
            "find the addresses of the dead; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it, and --rdzv-backend c10d"
        )
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
