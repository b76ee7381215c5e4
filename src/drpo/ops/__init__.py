"""The head operator: hidden states -> log-probabilities, without ever holding the logits of all tokens."""

from torch import Tensor

from drpo.errors import InputError
from drpo.ops import chunked


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability under softmax(hidden weight^T / temperature), and the softmax's entropy.

        logp_t = z_t[y_t] - logsumexp(z_t),   H_t = -sum_v p_t[v] log p_t[v],   z_t = weight hidden_t / temperature

    Both outputs are differentiable in `hidden` and `weight`, and both gradients are exact. Matrix products run in
    `hidden`'s dtype, everything else in float32, and the weight's gradient is accumulated in float32. A weight tied to
    the embedding is fine: autograd adds the two gradients. Memory beyond inputs and gradients: [chunk, V], a few times.

    Args:
        hidden: [T, H] float; the states that predict the targets.
        weight: [V, H] float; the output embedding; may have another dtype than `hidden` (float32 master weights).
        target: [T] int64 in [0, V).
        temperature: > 0.
        chunk: tokens per chunk; None chooses by memory. The result does not depend on it but for rounding.

    Returns:
        logp [T] and entropy [T], nats, float32 (float64 for float64 inputs).

    Raises:
        InputError: shapes that do not fit, or a temperature or chunk that is not positive.

    Example:
        >>> import torch
        >>> logp, entropy = linear_logprob(torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]))
        >>> logp.exp(), entropy.exp()
        (tensor([0.2500]), tensor([4.]))
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or target.shape != hidden.shape[:1]:
        raise InputError(
            f"linear_logprob: hidden {list(hidden.shape)}, weight {list(weight.shape)}, target {list(target.shape)} "
            "do not fit [T, H], [V, H], [T]"
        )
    if not temperature > 0:
        raise InputError(f"temperature={temperature}: must be > 0")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk={chunk}: must be at least 1")
    return chunked.linear_logprob(hidden, weight, target, temperature, chunk=chunk)


__all__ = ["linear_logprob"]
