"""Sampling one token per row by inverting the distribution function, with one random number per row."""

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.model.device import where_float64
from drpo.seeds import derive
from drpo.types import Sampling, TopK

CHUNK_ELEMENTS = 2**22
"""Upper bound of logits converted to float32 at once; bounds the memory of a draw."""

BLOCK = 256
"""Tokens summed in float32 per block; running sums of blocks are in float64."""


def uniforms(seed: tuple[int | str, ...], n: int) -> Tensor:
    """Return [n] float64 in [0, 1): the random numbers of one completion, a function of `seed` alone.

    Example:
        >>> bool((uniforms((0, "a", 1), 5)[:3] == uniforms((0, "a", 1), 3)).all())
        True
    """
    return torch.rand(n, generator=torch.Generator().manual_seed(derive(*seed)), dtype=torch.float64)


def draw(logits: Tensor, u: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Sample a token per row; return it with its log-probability under the distribution that it was sampled from.

    The distribution is softmax(logits / temperature) in float32, truncated by top-k and top-p and renormalised if these
    are on. A greedy token has the model's log-probability. The token is the first whose cumulative probability exceeds
    u, so the same u selects the same token independently of other rows, unless rounding of the logits moves a boundary
    across u.

    Args:
        logits: [B, V], any float dtype.
        u: [B] float64 in [0, 1); on the CPU where the device has no float64.
        sampling: temperature (0 means the most probable token), top_p, top_k.

    Returns:
        token [B] int64 and its log-probability [B] float32, nats, <= 0.

    Example:
        >>> logits, u = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0.3], dtype=torch.float64)
        >>> token, logp = draw(logits, u, Sampling())
        >>> token, logp.exp()
        (tensor([1]), tensor([0.7500]))
    """
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    drawn = [_draw(rows, numbers, sampling) for rows, numbers in zip(logits.split(size), u.split(size), strict=True)]
    return torch.cat([token for token, _ in drawn]), torch.cat([logp for _, logp in drawn])


def top_logprobs(logits: Tensor, sampling: Sampling) -> TopK:
    """Return the `sampling.top_logprobs` most probable tokens of each row under the distribution of `draw`.

    Args:
        logits: [B, V], any float dtype.
        sampling: temperature, top_p, top_k (all as in `draw`), top_logprobs.

    Returns:
        ids [B, K] and their log-probabilities [B, K] float32, nats; -inf only for tokens excluded by top-k or top-p,
        and with these on also for those whose probability rounds to 0, which are never drawn.

    Raises:
        InputError: K exceeds the vocabulary's size.

    Example:
        >>> top = top_logprobs(torch.tensor([[0.25, 0.1, 0.65]]).log(), Sampling(top_logprobs=2))
        >>> top.ids, top.logp.exp()
        (tensor([[2, 0]]), tensor([[0.6500, 0.2500]]))
    """
    vocab_size = logits.shape[-1]
    if sampling.top_logprobs > vocab_size:
        raise InputError(
            f"sampling.top_logprobs={sampling.top_logprobs}: the vocabulary has {vocab_size} tokens; ask for no more"
        )
    parts = logits.split(max(1, CHUNK_ELEMENTS // vocab_size))
    tops = [_log_distribution(rows, sampling).topk(sampling.top_logprobs) for rows in parts]
    return TopK.cat([TopK(ids, logp) for logp, ids in tops])


def _log_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return [B, V] log-probabilities by log_softmax, since small probabilities of a softmax round to 0."""
    log_p = torch.log_softmax(_scores(logits, sampling), dim=-1)
    if sampling.temperature == 0 or (sampling.top_k == 0 and sampling.top_p == 1):
        return log_p
    return _truncate(log_p.exp(), sampling).log()


def _scores(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the logits over the temperature, [B, V] float32."""
    scores = logits.float()
    return scores if sampling.temperature in (0, 1) else scores / sampling.temperature


def _draw(logits: Tensor, u: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Sample as `draw` does, without splitting the rows."""
    scores = _scores(logits, sampling)
    if sampling.temperature == 0:
        token = scores.argmax(-1)
        p = torch.softmax(scores, dim=-1)
    else:
        p = _truncate(torch.softmax(scores, dim=-1), sampling)
        token = _invert(where_float64(p), u).to(p.device)
    return token, p.gather(-1, token[:, None])[:, 0].log()


def _invert(p: Tensor, u: Tensor) -> Tensor:
    """Return the first index of each row of p [B, V] at which the running sum exceeds u [B] times the row's sum.

    Two levels, sums of blocks and then within a block, avoid a running sum over all of p. With NaN in p the index is
    arbitrary but in range.
    """
    blocks = torch.nn.functional.pad(p, (0, pad)) if (pad := -p.shape[-1] % BLOCK) else p
    blocks = blocks.unflatten(-1, (-1, BLOCK))
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    threshold = _below(u * cumulative[:, -1], cumulative[:, -1])
    block = torch.searchsorted(cumulative, threshold[:, None], right=True).clamp(max=cumulative.shape[-1] - 1)
    before = cumulative.gather(-1, (block - 1).clamp(min=0)).where(block > 0, 0)
    within = blocks.take_along_dim(block[:, :, None], 1)[:, 0].cumsum(-1, dtype=torch.float64)
    # The block's sum was rounded, so the remaining threshold may lie at its very end.
    rest = _below(threshold - before[:, 0], within[:, -1])
    index = torch.searchsorted(within, rest[:, None], right=True)
    return (block * BLOCK + index)[:, 0].clamp(max=p.shape[-1] - 1)


def _below(x: Tensor, total: Tensor) -> Tensor:
    """Return min(x, a float just below the total), so that the selected index has a probability above 0."""
    return torch.minimum(x, torch.nextafter(total, torch.zeros_like(total)))


def _truncate(p: Tensor, sampling: Sampling) -> Tensor:
    """Set tokens excluded by top-k and top-p to 0, and renormalise."""
    if sampling.top_k == 0 and sampling.top_p == 1:
        return p
    ordered, index = p.sort(dim=-1, descending=True)
    out = ordered.cumsum(-1) - ordered >= sampling.top_p
    out[:, 0] = False  # where top_p rounds to 0
    if sampling.top_k:
        out[:, sampling.top_k :] = True
    ordered = ordered.masked_fill(out, 0)
    return torch.zeros_like(p).scatter(-1, index, ordered / ordered.sum(-1, keepdim=True))
