"""Activations: what a micro-batch keeps for its backward pass, and computing it again instead (checkpointing)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from drpo.errors import InputError
from drpo.model.critic import Critic
from drpo.model.decoder import decoder_of
from drpo.model.packed_attention import predictor_states
from drpo.model.policy import Policy
from drpo.types import MicroBatch


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers that can be computed again, in order; empty where the model does not mark them."""
    inside: set[nn.Module] = set()
    layers = []
    for module in decoder_of(model).modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            layers.append(module)
            inside |= set(module.modules())
    return layers


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Make a model in training keep only the inputs of its decoder layers for the backward pass.

    The backward pass computes each layer once more, with the same operations on the same numbers, so gradients do not
    change. transformers' own switch requires train mode, which turns dropout on; this one does not.

    Args:
        model: changed in place; passes without gradients are as before.

    Raises:
        InputError: the model does not mark its layers.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv:1604.06174).
    """
    layers = decoder_layers(model)
    if not layers:
        raise InputError(
            f"checkpoint_activations=on: {type(model).__name__} does not mark its layers as those that can be computed "
            "again; set --checkpoint-activations off"
        )
    for layer in layers:
        vars(layer)["forward"] = _Checkpointed(layer.forward)  # within the hooks that gather the weights of the layer


def is_checkpointed(model: PreTrainedModel) -> bool:
    """Return whether `checkpoint_activations` was called for a model."""
    return any(isinstance(layer.forward, _Checkpointed) for layer in decoder_layers(model))


@dataclass(frozen=True)
class _Checkpointed:
    """A layer's `forward`; with gradients, the backward pass calls it again."""

    forward: Any

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*inputs, **named)
        # The backward pass may run in another thread, and after the contexts of the forward pass have ended.
        again = partial(copy_context().run, self.forward)
        outputs = checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
        torch.clear_autocast_cache()  # else a copy of every weight, in the compute dtype, stays until the last layer
        return outputs


@dataclass(frozen=True)
class ActivationBytes:
    """The bytes that one micro-batch keeps for its backward pass, without weights and head.

    Args:
        layers: of all decoder layers.
        largest_layer: of the layer that keeps most.
        largest_tensor: of a single tensor that a layer keeps.
        inputs: of the layers' inputs, which are part of `layers`.
        rest: of what is around the layers.
    """

    layers: int
    largest_layer: int
    largest_tensor: int
    inputs: int
    rest: int

    @property
    def gradients(self) -> int:
        """About the most that the gradients within a layer take: an activation function's, or the scores'."""
        return 2 * self.largest_tensor

    def peak(self, checkpointed: bool) -> int:
        """Return about the most bytes held in the backward pass.

        Args:
            checkpointed: the layers keep their inputs alone; one at a time is computed again.
        """
        kept = self.inputs + self.largest_layer if checkpointed else self.layers
        return self.rest + kept + self.gradients


@dataclass(eq=False)
class _Count:
    """The bytes of the storages that autograd saves, each storage counted once."""

    known: set[int]
    of_layer: list[int]
    inputs: list[int]
    largest: int = 0
    rest: int = 0
    further_outputs: tuple[None, ...] | None = None  # of a layer, beside the hidden states; None: it returns no tuple

    def know(self, tensors: Iterable[Tensor]) -> None:
        self.known |= {_storage(t) for t in tensors if not isinstance(t, DTensor)}

    def note(self, layer: int | None, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if _storage(tensor) not in self.known:
            self.known.add(_storage(tensor))
            if layer is None:
                self.rest += storage.nbytes()
            else:
                self.of_layer[layer] += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        return tensor.detach()  # a node that holds its own output would never be freed


def _storage(tensor: Tensor) -> int:
    """Return what is the same for tensors that share memory, those without memory (docs/what_fits.py) included."""
    return int(tensor.untyped_storage()._cdata)


def count_activations(model: Policy | Critic, micro: MicroBatch, sample: MicroBatch) -> ActivationBytes:
    """Return what a micro-batch keeps, from a forward pass through its first two layers.

    The other layers only pass their input on. They are taken to keep in proportion to what each keeps of `sample`,
    which passes through all of them.

    Args:
        model: in training; unchanged.
        micro: on the model's device.
        sample: likewise; a few tokens, which go through all layers.
    """
    small, full = _count(model, sample, computed=None), _count(model, micro, computed=2)
    by_layer, inputs = full.of_layer[:1], full.inputs[:1]
    for n in small.of_layer[1:]:
        by_layer.append(full.of_layer[1] * n // max(1, small.of_layer[1]))
        inputs.append(full.inputs[1])
    return ActivationBytes(sum(by_layer), max(by_layer), full.largest, sum(inputs), full.rest)


def _count(model: Policy | Critic, micro: MicroBatch, computed: int | None) -> _Count:
    """Run the first `computed` layers, or all, on a micro-batch and count; the graph is dropped."""
    layers = decoder_layers(model.model) or [decoder_of(model.model)]
    tensors = [*model.model.parameters(), *model.model.buffers()]
    count = _Count(set(), [0] * len(layers), [0] * len(layers))
    count.know(tensors)
    with _counting(layers, count, len(layers) if computed is None else computed):
        predictor_states(model.model, micro, model.dtype, shared=model.shares_prompts, limit=model.limit)
    if isinstance(decoder := decoder_of(model.model), FSDPModule):
        decoder.reshard()  # no backward pass does
    return count


@contextmanager
def _counting(layers: Sequence[nn.Module], count: _Count, computed: int) -> Iterator[None]:
    """Count what layers save; those from number `computed` on pass their input on."""
    replaced = [vars(layer).get("forward") for layer in layers]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(saved_tensors_hooks(partial(count.note, None), _unchanged))
        for number, layer in enumerate(layers):
            own = layer.forward.forward if isinstance(layer.forward, _Checkpointed) else layer.forward
            forward = partial(_counted, number, own, count) if number < computed else partial(_passed_on, count)
            vars(layer)["forward"] = partial(forward, layer)
        try:
            yield
        finally:
            for layer, before in zip(layers, replaced, strict=True):
                vars(layer).pop("forward")
                if before is not None:
                    vars(layer)["forward"] = before


def _counted(number: int, forward: Any, count: _Count, layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    count.know(layer.parameters())  # where weights are divided, those gathered for this pass
    count.inputs[number] = sum(x.nbytes for x in inputs if isinstance(x, Tensor))
    with saved_tensors_hooks(partial(count.note, number), _unchanged):
        output = forward(*inputs, **named)
    # The graph holds `count`, so `count` must not hold the graph.
    count.further_outputs = None if isinstance(output, Tensor) else (None,) * (len(output) - 1)
    return output


def _passed_on(count: _Count, layer: nn.Module, hidden: Tensor, *inputs: Any, **named: Any) -> Any:
    return hidden if count.further_outputs is None else (hidden, *count.further_outputs)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
