"""The limits of Mamba 2's time steps, which transformers applies to whole texts but not to one token after a cache."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def limit_time_steps(model: nn.Module) -> list[RemovableHandle]:
    """Clamp what becomes a time step where the layer projects it, so that every pass keeps the limits.

        dt = clamp(softplus(x + bias), low, high) = softplus(clamp(x, f(low) - bias, f(high) - bias) + bias)

    with f the inverse of softplus. It changes nothing where the limits are applied already.

    Args:
        model: its layers with limits (Nemotron-H's, Zamba 2's) get a hook.

    Returns:
        The hooks, empty for other models.
    """
    return [
        module.in_proj.register_forward_hook(_clamp(module, *map(float, module.time_step_limit)))
        for module in _limited(model)
    ]


def _limited(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        low, high = getattr(module, "time_step_limit", (0.0, torch.inf))
        parts = (getattr(module, name, None) for name in ("in_proj", "dt_bias"))
        if (low > 0 or high < torch.inf) and all(part is not None for part in parts):
            yield module


def _clamp(module: Any, low: float, high: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    ends = torch.tensor([low, high], dtype=torch.float64)
    inverse = ends + torch.log(-torch.expm1(-ends))  # -inf at 0, inf at inf

    def hook(_: nn.Module, __: tuple[Tensor, ...], projected: Tensor) -> Tensor:
        bias = module.dt_bias
        lowest, highest = (inverse.to(bias.device)[:, None] - bias).to(projected.dtype)
        return torch.cat([projected[..., : -len(bias)], projected[..., -len(bias) :].clamp(lowest, highest)], dim=-1)

    return hook
