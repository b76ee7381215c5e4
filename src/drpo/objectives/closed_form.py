"""Losses whose derivative is stated in closed form, as papers do; a second derivative raises."""

from typing import Any

import torch
from torch import Tensor

from drpo.objectives.ratios import ratio, wide
from drpo.types import TokenLoss, Tokens

SECOND = (
    "drpo: a loss with a gradient in closed form has no second derivative; leave out create_graph=True, or write the "
    "objective in plain operations"
)


def token_loss(tokens: Tokens, value: Tensor, slope: Tensor) -> TokenLoss:
    """Return the loss with this value and this derivative with respect to `tokens.logp`, both [T] constants.

    Objectives state their derivative in closed form, as papers do. It stays exact where autograd would compute inf * 0
    (capped ratios, vanishing probabilities). A second derivative raises.
    """
    loss: Tensor = _ClosedForm.apply(tokens.logp, value.detach(), slope.detach())  # type: ignore[no-untyped-call]
    return TokenLoss(loss)


def masked_surrogate(tokens: Tokens, kept: Tensor, most: float = torch.inf) -> TokenLoss:
    """Return the surrogate -r A where `kept` [T] is True, else 0; larger ratios count as `most`."""
    _, _, advantage = wide(tokens)
    loss = -advantage * ratio(tokens).clamp(max=most) * kept
    return token_loss(tokens, value=loss, slope=loss)


class _ClosedForm(torch.autograd.Function):
    """(logp, value, slope) [T] -> value, with d value / d logp = slope, also where logp is -inf."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logp: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        logp, _, slope = inputs
        ctx.save_for_backward(logp, slope)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logp, slope = ctx.saved_tensors
        return differentiated((grads[0] * slope).to(logp.dtype), logp), None, None


def differentiated(gradient: Tensor, source: Tensor) -> Tensor:
    """Return `gradient`, a gradient in `source`, such that differentiating it raises."""
    guarded: Tensor = _NoSecond.apply(gradient, source)  # type: ignore[no-untyped-call]
    return guarded


class _NoSecond(torch.autograd.Function):
    """The identity on a gradient, as a function of the differentiated tensor; its derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(SECOND)
