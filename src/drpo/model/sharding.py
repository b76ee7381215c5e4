"""A policy and a critic with weights, gradients and optimiser state sharded over the ranks (FSDP2)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.model.critic import Critic
from drpo.model.decoder import decoder_of
from drpo.model.policy import Policy
from drpo.model.precision import Precision
from drpo.ops import Head
from drpo.ranks import Ranks
from drpo.types import MicroBatch


class ShardedPolicy(Policy):
    """`Policy` with every parameter sharded over the ranks along its first dimension.

    FSDP2 gathers a layer's weights when the layer computes, and reduces and scatters its gradient. The head is never
    called as a layer: its weight is gathered once per update, and its gradient is reduced and scattered once, in
    `reduce_gradients`. With LoRA frozen weights and adapters are both sharded. All ranks must run the same number of
    forward and backward passes.

    Args:
        model: in float32, whole, on `device`; every rank holds all of it until it is sharded here.
        ranks: the processes that share the weights.
        device: this rank's device.
        precision: as for `Policy`; no grid.
        temperature, lora_rank, seed, replays: as for `Policy`.

    Raises:
        InputError: as `Policy`; or an 8-bit precision.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ranks: Ranks,
        device: torch.device,
        *,
        precision: Precision,
        temperature: float,
        lora_rank: int = 0,
        seed: int = 0,
        replays: bool = False,
    ) -> None:
        if precision.weights is not None or precision.activations is not None:
            raise InputError("shard=fsdp: weights that are divided cannot be on a grid of 8 bits; set --precision bf16")
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            raise InputError(f"shard=fsdp: the head of {type(model).__name__} has a bias; set --shard none")
        self._whole_head: Tensor | None = None  # gathered by the first pass of an update; weights may be loaded before
        super().__init__(
            model, precision=precision, temperature=temperature, lora_rank=lora_rank, seed=seed, replays=replays
        )
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        mesh = init_device_mesh(device.type, (ranks.size,))
        _divide(decoder_of(model), mesh)
        if tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        else:
            _divide_module(model.get_output_embeddings(), mesh)
        self._mesh, self._device = mesh, device

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self._device

    @property
    def equal_passes(self) -> bool:
        """Ranks meet in every forward and backward pass."""
        return True

    @property
    def gathered_bytes(self) -> int:
        """The most bytes of whole weights and gradients that this rank holds at once, beside its own rows.

        They are the head, what is around the layers (the embedding), two layers, since the next one is gathered while
        one computes, and a gradient as computed and as sent.
        """
        decoder, head = decoder_of(self.model), self._divided_head
        within = {p for layer in decoder.layers for p in layer.parameters()}
        around = [p for p in decoder.parameters() if p not in within]
        parts = [around, *(list(layer.parameters()) for layer in decoder.layers)]
        layers = sorted(sum(p.nbytes for p in part) for part in parts[1:])
        gradient = max(sum(p.nbytes for p in part if p.requires_grad) for part in parts)
        return int(sum(p.nbytes for p in [*around, head]) + sum(layers[-2:]) + 2 * gradient)

    @property
    def head(self) -> Head:
        """The whole output layer, gathered from all ranks."""
        if self._whole_head is None:
            divided = self._divided_head
            self._whole_head = self._whole(divided).requires_grad_(divided.requires_grad)
        return self._head_shape.of(self._whole_head, None)

    @property
    def _divided_head(self) -> nn.Parameter:
        weight: nn.Parameter = self.model.get_output_embeddings().weight
        return weight

    def routes(self, micro: MicroBatch) -> Tensor:
        """Return what `Policy.routes` does; a pass without a backward pass would leave outermost weights gathered."""
        routes = super().routes(micro)
        decoder_of(self.model).reshard()
        return routes

    def reduce_gradients(self, ranks: Ranks) -> None:
        """Reduce and scatter the head's gradient; FSDP2 has reduced the others."""
        if self._whole_head is not None and self._whole_head.grad is not None:
            local = DTensor.from_local(self._whole_head.grad, self._mesh, [Partial()])
            head = self._divided_head
            shard = local.redistribute(self._mesh, [Shard(0)])
            head.grad = shard if head.grad is None else head.grad + shard
        self._whole_head = None
        _fill_gradients(self.trainable().values())

    def state(self) -> Mapping[str, Tensor]:
        """Return whole weights and persistent buffers by the plain model's names; a collective, call on all ranks."""
        # After a forward pass alone the embedding is still gathered, and not the same parameter as a head tied to it.
        decoder_of(self.model).reshard()
        return dict(super().state())

    def _whole(self, parameter: Tensor) -> Tensor:
        """Return a parameter's values, gathered from all ranks."""
        return _gathered(parameter)

    def _delta(self, layer: Any) -> Tensor:
        """Return what a layer of PEFT adds to the weight that it adapts, from whole adapters."""
        with _whole_parameters(layer.lora_A), _whole_parameters(layer.lora_B):
            return super()._delta(layer)


class ShardedCritic(Critic):
    """`Critic` with every parameter sharded over the ranks along its first dimension.

    Its head is called as a layer and sharded as one; the single row is on the first rank. All ranks must run the same
    number of forward and backward passes.

    Args:
        model: as for `Critic`, whole, on this rank's device; sharded here.
        ranks: the processes that share the weights.
        dtype: as for `Critic`.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks, *, dtype: torch.dtype) -> None:
        super().__init__(model, dtype=dtype)
        mesh = init_device_mesh(model.device.type, (ranks.size,))
        for outermost in (_divide(decoder_of(model), mesh), _divide_module(self.head, mesh)):
            # FSDP2 keeps the outermost module gathered until a backward pass; a rollout's values run without one.
            outermost.set_reshard_after_forward(True, recurse=False)

    @property
    def equal_passes(self) -> bool:
        """Ranks meet in every forward and backward pass."""
        return True

    def reduce_gradients(self, ranks: Ranks) -> None:
        """Set missing gradients to zero; FSDP2 has reduced the others."""
        _fill_gradients(self.trainable().values())


def _divide(decoder: Any, mesh: DeviceMesh) -> FSDPModule:
    """Shard a decoder's weights, gathered layer by layer."""
    for layer in decoder.layers:
        _divide_module(layer, mesh)
    return _divide_module(decoder, mesh)


def _divide_module(module: nn.Module, mesh: DeviceMesh) -> FSDPModule:
    """Shard those of a module's weights that are not sharded yet."""
    divided: FSDPModule = fully_shard(module, mesh=mesh)
    # A sum, not a mean: each token's weight is fixed over the whole batch.
    divided.set_force_sum_reduction_for_comms(True)
    divided.set_gradient_divide_factor(1.0)
    return divided


def _fill_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set missing gradients to zero."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@contextmanager
def _whole_parameters(module: nn.Module) -> Iterator[None]:
    """Put gathered values in the place of a module's sharded parameters; a collective."""
    sharded = [(m, n, p) for m in module.modules() for n, p in m.named_parameters(recurse=False)]
    for owner, name, parameter in sharded:
        owner._parameters[name] = nn.Parameter(_gathered(parameter), requires_grad=False)
    try:
        yield
    finally:
        for owner, name, parameter in sharded:
            owner._parameters[name] = parameter


def _gathered(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
