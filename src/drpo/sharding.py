"""A policy whose weights, gradients and optimiser state are divided over the ranks (FSDP2)."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.policy import Policy
from drpo.precision import Precision
from drpo.ranks import Ranks


class ShardedPolicy(Policy):
    """`Policy` whose every parameter is divided over the ranks along its first dimension.

    A layer's weights are gathered when it computes and its gradient is summed over the ranks and divided again, by
    FSDP2. The head is not a layer that is called: its weight is gathered once an update, and its gradient is summed and
    divided once, in `reduce_gradients`. All ranks must do as many forward and backward passes.

    Args:
        model: in float32, whole, on `device`; every rank holds all of it until its weights are divided here.
        ranks: among which.
        device: of this rank's part.
        precision: as of `Policy`; no grid.
        temperature: as of `Policy`.

    Raises:
        InputError: as `Policy`; or a precision of 8 bits.
    """

    def __init__(
        self, model: PreTrainedModel, ranks: Ranks, device: torch.device, *, precision: Precision, temperature: float
    ) -> None:
        if precision.weights is not None or precision.activations is not None:
            raise InputError("shard=fsdp: weights that are divided cannot be on a grid of 8 bits; set --precision bf16")
        self._whole_head: Tensor | None = None
        super().__init__(model, precision=precision, temperature=temperature)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        mesh = init_device_mesh(device.type, (ranks.size,))
        decoder = model.get_decoder()
        for layer in decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(decoder, mesh=mesh)
        if tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        else:
            fully_shard(model.get_output_embeddings(), mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # A sum, not a mean: what a token counts is fixed over the whole batch, whoever computes it.
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        self._mesh, self._device = mesh, device

    @property
    def device(self) -> torch.device:
        """Where this rank's part is."""
        return self._device

    @property
    def equal_passes(self) -> bool:
        """Ranks meet in every forward and backward pass."""
        return True

    @property
    def _head(self) -> Tensor:
        if self._whole_head is None:
            self._whole_head = _whole(self._divided_head).detach().requires_grad_(self._divided_head.requires_grad)
        return self._whole_head

    @property
    def _divided_head(self) -> nn.Parameter:
        weight: nn.Parameter = self.model.get_output_embeddings().weight
        return weight

    def reduce_gradients(self, ranks: Ranks) -> None:
        """Add the head's gradient of all ranks to the divided parameter's; FSDP2 has done so with the others."""
        if self._whole_head is not None and self._whole_head.grad is not None:
            local = DTensor.from_local(self._whole_head.grad, self._mesh, [Partial()])
            head = self._divided_head
            part = local.redistribute(self._mesh, [Shard(0)])
            head.grad = part if head.grad is None else head.grad + part
        self._whole_head = None
        for parameter in self.trainable().values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def state(self) -> Mapping[str, Tensor]:
        """The whole weights by the plain model's names, float32; all ranks must ask together."""
        return dict(self._gathered())

    @torch.no_grad()
    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, _whole(parameter)


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
