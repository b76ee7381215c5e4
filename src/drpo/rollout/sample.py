"""Drawing one token per row by inverting the distribution function, with each row's own random number."""

import torch
from torch import Tensor

from drpo.seeds import derive
from drpo.types import Sampling


def uniforms(seed: tuple[int | str, ...], n: int) -> Tensor:
    """Return [n] float64 in [0, 1): the random numbers of one completion, a function of `seed` alone.

    Example:
        >>> bool((uniforms((0, "a", 1), 5)[:3] == uniforms((0, "a", 1), 3)).all())
        True
    """
    return torch.rand(n, generator=torch.Generator().manual_seed(derive(*seed)), dtype=torch.float64)


def draw(logits: Tensor, u: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token per row and report its log-probability under the law it was drawn from (greedy: under the model's).

    The law is softmax(logits / temperature) in float32, cut to top-k and top-p and renormalised where those are on. The
    token is the first whose cumulative probability exceeds u, so the same u gives the same token whatever the other
    rows are, unless rounding of the logits moves a boundary across u.

    Args:
        logits: [B, V], any float dtype.
        u: [B] float64 in [0, 1).
        sampling: temperature (0 means the likeliest token), top_p, top_k.

    Returns:
        token [B] int64 and its log-probability [B] float32, nats, <= 0.

    Example:
        >>> logits, u = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0.3], dtype=torch.float64)
        >>> token, logp = draw(logits, u, Sampling())
        >>> token, logp.exp()
        (tensor([1]), tensor([0.7500]))
    """
    if sampling.temperature == 0:
        logp = torch.log_softmax(logits.float(), dim=-1)
        token = logp.argmax(-1)
    else:
        logp = _truncate(torch.log_softmax(logits.float() / sampling.temperature, dim=-1), sampling)
        cumulative = logp.exp().cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        # Strictly below the total, so that the token found has a probability above 0.
        threshold = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        # Logits that are NaN have no law; the index stays in range, and its NaN log-probability is refused by name.
        token = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]


def _truncate(logp: Tensor, sampling: Sampling) -> Tensor:
    """Rule out what top-k and top-p leave out, and renormalise."""
    if sampling.top_k == 0 and sampling.top_p == 1:
        return logp
    ordered, index = logp.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    out = before >= sampling.top_p
    if sampling.top_k:
        out[:, sampling.top_k :] = True
    return torch.log_softmax(ordered.masked_fill(out, -torch.inf).gather(-1, index.argsort(-1)), dim=-1)
