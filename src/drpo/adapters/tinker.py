"""Tinker and services with its interface: an objective for `TrainingClient.forward_backward_custom`.

The service computes the log-probabilities of `target_tokens`. The client differentiates the loss, and the service runs
backward with these derivatives as weights of a cross-entropy: the gradient is exactly the objective's. This takes two
forward passes. Each `Datum` holds the sampler's log-probabilities and the advantages, under the names of Tinker's
`importance_sampling` and `ppo` losses.
"""

from collections.abc import Callable, Sequence

import torch
from tinker import Datum
from torch import Tensor

from drpo.adapters.weighing import figures, objective_of, token_loss, warn_untested
from drpo.errors import InputError
from drpo.objectives import vanishes_at_zero_advantage

CustomLoss = Callable[[list[Datum], list[Tensor]], tuple[Tensor, dict[str, float]]]


def drpo_loss(objective: str | None = None) -> CustomLoss:
    """Build the loss for `forward_backward_custom(data, loss)`, summed over tokens as Tinker's own losses are.

    Each `Datum.loss_fn_inputs` holds, aligned with `target_tokens`, [T]:

    - `logprobs`: nats, the sampler's own (`SampledSequence.logprobs`); anything at tokens that are not trained.
    - `advantages`: per token; 0 at tokens that are not trained.
    - `mask`, optional: 1 where a token is trained. Without it those with an advantage other than 0 are.

    Args:
        objective: its spec, such as "drpo(0.2)".

    Returns:
        `loss(data, logprobs) -> (sum over trained tokens, figures under "drpo/")`.

    Raises:
        InputError: no objective, an unknown objective, or an objective with a top-K divergence. On a call: a datum with
            missing inputs or other shapes; no `mask` for an objective that is not weighted by the advantage.

    Example:
        >>> from tinker import ModelInput
        >>> inputs = {"target_tokens": [5, 6], "logprobs": [0.0, -0.7], "advantages": [0.0, 2.0]}
        >>> datum = Datum(model_input=ModelInput.from_ints([4, 5]), loss_fn_inputs=inputs)
        >>> drpo_loss("drpo(0.2)")([datum], [torch.tensor([-3.0, -0.7])])[0]
        tensor(-2.)
    """
    chosen = objective_of(objective, "objective")
    needs_mask = not vanishes_at_zero_advantage(chosen)
    warn_untested("tinker", "0.32.0", "0.38.0")

    def loss(data: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        rows = [
            _columns(i, datum, logp, needs_mask) for i, (datum, logp) in enumerate(zip(data, logprobs, strict=True))
        ]
        logp, behavior_logp, advantage, keep = (torch.cat(column) for column in zip(*rows, strict=True))
        lengths = torch.tensor([len(each) for each in logprobs])
        sequence = torch.repeat_interleave(torch.arange(len(data)), lengths)
        region = figures(chosen, logp, behavior_logp, advantage, keep)
        total = token_loss(chosen, logp, behavior_logp, advantage, keep, sequence).sum()
        return total, {f"drpo/{name}": value.item() for name, value in region.items()}

    return loss


def _columns(index: int, datum: Datum, logp: Tensor, needs_mask: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the objective's inputs from one datum, each [T]."""
    behavior_logp, advantage = (_input(index, datum, name, logp.shape) for name in ("logprobs", "advantages"))
    if "mask" in datum.loss_fn_inputs:
        return logp, behavior_logp, advantage, _input(index, datum, "mask", logp.shape) != 0
    if needs_mask:
        raise InputError(
            f"data[{index}].loss_fn_inputs has no 'mask': this objective trains tokens without an advantage, or does "
            "not say vanishes_at_zero_advantage = True; mark those that were sampled with 1, the others with 0"
        )
    return logp, behavior_logp, advantage, advantage != 0


def _input(index: int, datum: Datum, name: str, shape: Sequence[int]) -> Tensor:
    """Return one of a datum's inputs; its shape must be that of the log-probabilities."""
    if name not in datum.loss_fn_inputs:
        raise InputError(f"data[{index}].loss_fn_inputs has no {name!r}: give one value for each of its target_tokens")
    values: Tensor = datum.loss_fn_inputs[name].to_torch()
    if len(shape) != 1 or values.shape != shape:
        raise InputError(
            f"data[{index}].loss_fn_inputs[{name!r}] {list(values.shape)}: must have one value for each of its "
            f"target_tokens, {list(shape)}"
        )
    return values
