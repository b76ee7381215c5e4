"""prime-rl's custom loss: `[trainer.loss] type = "custom"`, `import_path = "drpo.adapters.prime_rl.drpo_loss"`.

prime-rl calls the function with one sequence at a time and reads `loss` and `metrics` of the result, of any class.
prime-rl is not imported here. Its `inference_logprobs` are always those of the inference engine, so every configuration
is valid. prime-rl divides the sums by the number of trained tokens of the global batch; since September 2026 by the sum
of their weights.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from drpo.adapters.weighing import figures, objective_of, token_loss
from drpo.errors import InputError

FIELD = "trainer.loss.kwargs.objective"


class LossInputs(Protocol):
    """The fields of prime-rl's inputs that are used; each is [T], one sequence."""

    @property
    def trainer_logprobs(self) -> Tensor:
        """The current policy, nats; the only input with a gradient."""

    @property
    def inference_logprobs(self) -> Tensor:
        """The sampler's, nats."""

    @property
    def advantages(self) -> Tensor:
        """Per token."""

    @property
    def loss_mask(self) -> Tensor:
        """True where a token is trained by this loss."""

    @property
    def loss_weights(self) -> Tensor | None:
        """A factor per token; None means 1."""


@dataclass(frozen=True)
class LossOutputs:
    """The fields of a loss that prime-rl reads.

    Args:
        loss: scalar; the sum over the trained tokens of one sequence.
        metrics: scalars, logged beside the trainer's own.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def drpo_loss(inputs: LossInputs, *, objective: str | None = None) -> LossOutputs:
    """Return an objective's loss of one sequence, summed over its trained tokens.

        loss = sum over tokens with loss_mask of loss_weights * objective(pi, mu, A)

    Args:
        inputs: prime-rl's `LossInputs`, or anything with these attributes.
        objective: its spec, such as "drpo(0.2)"; from `trainer.loss.kwargs`.

    Returns:
        The sum, and `figures` under "drpo/".

    Raises:
        InputError: no objective, an unknown one, or one that reads a top-K divergence.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> logp = torch.tensor([-0.5, -0.7, 0.0]).requires_grad_()
        >>> one = SimpleNamespace(
        ...     trainer_logprobs=logp, inference_logprobs=logp.detach(), advantages=torch.full((3,), 2.0),
        ...     loss_mask=torch.tensor([True, True, False]), loss_weights=None,
        ... )
        >>> drpo_loss(one, objective="drpo(0.2)").loss
        tensor(-4., grad_fn=<SumBackward0>)
    """
    chosen = objective_of(objective, FIELD)
    columns = (inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages, inputs.loss_mask)
    loss = token_loss(chosen, *columns)[inputs.loss_mask]
    if inputs.loss_weights is not None:
        weights = inputs.loss_weights[inputs.loss_mask]
        if not weights.isfinite().all():
            raise InputError("loss_weights: NaN or infinite at a trained token")
        loss = loss * weights
    region = figures(chosen, *columns)
    return LossOutputs(loss.sum(), {f"drpo/{name}": value for name, value in region.items()})
