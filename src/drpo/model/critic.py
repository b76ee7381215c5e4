"""The critic: a second transformer with a scalar head, on the same packed positions as the policy."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drpo.credit.gae import value_loss
from drpo.model.decoder import decoder_of
from drpo.model.loading import persistent_buffers
from drpo.model.packed_attention import enable_packed_attention, predictor_states
from drpo.model.positions import sequence_limit
from drpo.ranks import Ranks
from drpo.types import MicroBatch


class Critic:
    """A model's decoder and a linear output, zero at first, that estimates the expected return of a context.

    Args:
        model: in float32, used by the critic alone; its decoder is trained in place, its head is dropped.
        dtype: the dtype of matrix products and activations; the weights, the head and the values are float32.

    Attributes:
        shares_prompts, limit, max_positions: as for `Policy`.
    """

    def __init__(self, model: PreTrainedModel, *, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.limit = sequence_limit(model)
        self.max_positions: int | None = None
        self.shares_prompts = enable_packed_attention(model)
        model.set_output_embeddings(nn.Identity())  # not None: `decoder_of` looks within a part that has a head
        width = model.get_input_embeddings().weight.shape[1]
        self.head = nn.Linear(width, 1, device=model.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def equal_passes(self) -> bool:
        """True if all ranks must run the same number of forward and backward passes (collectives inside)."""
        return False

    @property
    def device(self) -> torch.device:
        """The weights' device."""
        device: torch.device = self.model.device
        return device

    def __call__(self, micro: MicroBatch) -> Tensor:
        """Return V [T] of the contexts of a micro-batch's tokens, float32, with gradients."""
        states = predictor_states(self.model, micro, self.dtype, shared=self.shares_prompts, limit=self.limit)
        values: Tensor = self.head(states.to(self.head.weight.dtype))[:, 0]
        return values

    def loss(self, micro: MicroBatch, clip: float | None) -> tuple[Tensor, Tensor]:
        """Return the micro-batch's part of the value loss, sum(weight * loss), and V [T], detached.

        Args:
            micro: with old values and returns.
            clip: as for `value_loss`.
        """
        assert micro.value is not None and micro.returns is not None
        value = self(micro)
        return (micro.weight * value_loss(value, micro.value, micro.returns, clip)).sum(), value.detach()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, by name."""
        decoder = {f"decoder.{name}": p for name, p in decoder_of(self.model).named_parameters()}
        return decoder | {f"head.{name}": p for name, p in self.head.named_parameters()}

    def embeddings(self) -> list[nn.Parameter]:
        """Return the weights of the embeddings and of the head, which do not map hidden states to hidden states."""
        tables: list[Any] = [m for m in self.model.modules() if isinstance(m, nn.Embedding)]
        return [m.weight for m in (*tables, self.head)]

    def checkpointed(self) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, by name: the trained parameters and the persistent buffers."""
        buffers = persistent_buffers(decoder_of(self.model))
        return self.trainable() | {f"decoder.{name}": buffer for name, buffer in buffers.items()}

    def reduce_gradients(self, ranks: Ranks) -> None:
        """Sum the gradients over the ranks; afterwards every parameter has a gradient, possibly zero."""
        ranks.all_reduce_gradients(self.trainable().values())
