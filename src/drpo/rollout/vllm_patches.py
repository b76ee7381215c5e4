"""All that changes vLLM's own behaviour: methods added to its worker, and side effects that are undone.

vLLM mixes `WeightLoader` into its worker, in this process or in a server (option `worker_extension_cls`), so its
methods can be called by name.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

EXTENSION = f"{__name__}.WeightLoader"
"""The value of `worker_extension_cls`."""


class Worker(Protocol):
    """The methods of vLLM's worker that are used here."""

    def reload_weights(self, weights_iterator: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint's tensors into the model, in place."""
        ...

    def get_model(self) -> nn.Module:
        """Return the model."""
        ...


@dataclass(frozen=True)
class Changed:
    """A class of transformers that vLLM has changed.

    Args:
        cls: the class.
        bases: those that it had before.
        own: its attributes before.
    """

    cls: type
    bases: tuple[type, ...]
    own: dict[str, Any]

    @staticmethod
    def to_be(cls: type) -> "Changed":
        """Note a class before it is changed."""
        return Changed(cls, cls.__bases__, dict(vars(cls)))

    def given(self) -> dict[str, Any]:
        """Return what it was given."""
        return {name: value for name, value in vars(self.cls).items() if self.own.get(name) is not value}

    def twin(self) -> type:
        """Return a class that is what this one was made; stays so when this one is restored."""
        added = [base for base in self.cls.__bases__ if base not in self.bases]
        return type(self.cls.__name__, (self.cls, *added), self.given())

    def undo(self) -> None:
        """Restore it."""
        for name in self.given():
            if name in self.own:
                setattr(self.cls, name, self.own[name])
            else:
                delattr(self.cls, name)
        self.cls.__bases__ = self.bases


class WeightLoader:
    """Methods added to vLLM's worker; the prefix avoids collisions."""

    def drpo_load(self: Worker, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint's tensors, by name.

        Raises:
            RuntimeError: an output head still computes with other weights.
        """
        with torch.no_grad():
            self.reload_weights(weights_iterator=iter(weights))
            refresh_packed(self.get_model())

    def drpo_load_file(self: Any, path: str) -> None:
        """Load a safetensors file."""
        self.drpo_load(_tensors(path))

    def drpo_own_classes(self: Worker, changed: Sequence[Changed]) -> None:
        """Give the model's modules classes of their own in place of those of transformers that vLLM changed."""
        twins = {one.cls: one.twin() for one in changed}
        for module in self.get_model().modules():
            if (twin := twins.get(type(module))) is not None:
                module.__class__ = twin

    def drpo_dtype(self: Worker) -> dict[str, str]:
        """Return the most frequent dtype of the model's parameters."""
        dtypes = [str(p.dtype).removeprefix("torch.") for p in self.get_model().parameters()]
        return {"dtype": max(set(dtypes), key=dtypes.count)}


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield one tensor at a time, so that the file may exceed the free memory."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield name, file.get_tensor(name)


def refresh_packed(model: nn.Module) -> None:
    """Repack the layers that vLLM's reloading leaves stale, and verify every packed head.

    On a CPU vLLM multiplies by a packed copy of each weight (`layer.cpu_linear`). `reload_weights` repacks a layer only
    after loading a tensor *for that layer*. A tied head has no tensor of its own, so its packed copy keeps the old
    weights while its weight, shared with the embedding, is new (vllm/model_executor/model_loader/reload/layerwise.py,
    `finalize_layerwise_processing`, in 0.32). On a GPU nothing is packed and this does nothing.

    Args:
        model: vLLM's model, after `reload_weights`.

    Raises:
        RuntimeError: a packed copy does not match its weight.
    """
    for layer in _packed_beside_weight(model):
        layer.quant_method.process_weights_after_loading(layer)
        _check_packed(layer)


def _packed_beside_weight(model: nn.Module) -> list[Any]:
    """Return the layers with both a weight and a packed copy: embeddings and heads."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "cpu_linear")]
    return [layer for layer in layers if layer.weight.dim() == 2 and layer.weight.numel() > 0]


def _check_packed(layer: Any) -> None:
    weight = layer.weight
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, weight.shape[1], generator=generator).to(weight)
    output, expected = layer.quant_method.apply(layer, probe).float(), (probe.float() @ weight.float().T)
    if not torch.allclose(output, expected, rtol=0, atol=0.02 * float(expected.abs().max())):
        raise RuntimeError(f"{type(layer).__name__}: its packed weights are not those that were loaded")


@contextmanager
def threads_kept() -> Iterator[None]:
    """Restore torch's threads: on a CPU vLLM sets one thread and replaces `set_num_threads` by a no-op."""
    function, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = function
        torch.set_num_threads(threads)


@contextmanager
def transformers_kept() -> Iterator[list[Changed]]:
    """Undo what vLLM does to transformers' own classes: it makes a model's decoder one that it compiles.

    Every instance would become one, the trainer's too, which lacks what vLLM's has and fails at its next call
    (vllm/model_executor/models/transformers/base.py, `_decorate_cls_for_torch_compile`, in 0.32).

    Yields:
        The classes changed so far, for `WeightLoader.drpo_own_classes`, which keeps vLLM's own model as it is.
    """
    from vllm.compilation import decorators  # noqa: PLC0415 (an optional backend)

    decorate, changed = decorators._support_torch_compile, list[Changed]()

    def noting(cls: type, *args: Any, **kwargs: Any) -> type:
        if cls.__module__.startswith("transformers.") and cls not in [one.cls for one in changed]:
            changed.append(Changed.to_be(cls))
        return decorate(cls, *args, **kwargs)  # type: ignore[no-any-return]

    decorators._support_torch_compile = noting
    try:
        yield changed
    finally:
        decorators._support_torch_compile = decorate
        for one in changed:
            one.undo()


def world_size() -> int:
    """Return the size of torch.distributed's default group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def launcher_variables(device: torch.device) -> Iterator[None]:
    """Set RANK and LOCAL_RANK as vLLM reads them with several processes; restore them afterwards.

    The launcher's LOCAL_RANK counts the node's devices; vLLM uses it as an index into the visible devices.
    """
    if world_size() == 1:
        yield
        return
    ours = {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(device.index or 0)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def spare_world() -> None:
    """Keep vLLM from destroying torch's default process group, except in a world of one, which vLLM created.

    vLLM destroys the group whenever an engine ends or is garbage-collected; the trainer still needs it.
    """
    from vllm.distributed import parallel_state as state  # noqa: PLC0415 (an optional backend)

    destroy_all, destroy_group = state.destroy_distributed_environment, dist.destroy_process_group

    def destroy() -> None:
        if world_size() > 1:
            dist.destroy_process_group = lambda group=None: None if group is None else destroy_group(group)
        try:
            destroy_all()
        finally:
            dist.destroy_process_group = destroy_group

    state.destroy_distributed_environment = destroy
