"""Products with a weight on a CPU, by the fastest way for the number of rows."""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

FEW_ROWS = 5
"""Up to so many rows a product is faster with the weight on the left."""

SOME_ROWS = 128
"""Up to so many rows a float32 product is faster as a batch of products with parts of the weight."""

WIDE, BLOCK = 2048, 512
"""With more rows a float32 product of at least so many outputs is faster in blocks that stay in the cache."""

CONVERTED = 2**18
"""So many numbers of an int8 weight are converted at once: they stay in the cache."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias in x's dtype; how it is rounded may depend on the number of rows and of threads.

    PyTorch's product of a few float32 rows may run in one thread; a batch of products runs in all of them. An int8
    weight is converted block by block, so that no copy of the whole is written to memory.

    Args:
        x: [B, in], float.
        weight: [out, in], contiguous, of x's dtype or int8.
        bias: [out] or None.

    Returns:
        [B, out], contiguous.

    Example:
        >>> product(torch.tensor([[0.5, 2.0]]), torch.tensor([[2, 1], [0, -1]], dtype=torch.int8))
        tensor([[ 3., -2.]])
    """
    if not weight.numel():
        return linear(x, weight.to(x.dtype), bias)
    if weight.dtype == torch.int8:
        y = _in_turn(x, weight, max(1, CONVERTED // weight.shape[1]))
    elif x.dtype != torch.float32:
        return linear(x, weight, bias)
    elif len(x) <= SOME_ROWS:
        y = _in_parts(x, weight)
    elif len(weight) >= WIDE:
        y = _in_turn(x, weight, BLOCK)
    else:
        return linear(x, weight, bias)
    return y if bias is None else y.add_(bias)


def _in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weight^T as a batch of products with equal parts of the weight, as many as threads if that can be."""
    (n_rows, n_in), n_out = x.shape, len(weight)
    n_parts = _divisor(n_out, max(torch.get_num_threads(), n_out // BLOCK))
    parts = weight.view(n_parts, -1, n_in)
    if n_rows > FEW_ROWS:
        return torch.bmm(x.expand(n_parts, -1, -1), parts.mT).transpose(0, 1).reshape(n_rows, n_out).contiguous()
    columns = x.contiguous().as_strided((n_parts, n_in, n_rows), (0, 1, n_in))  # one row's stride may be any: 1 is slow
    y = torch.bmm(parts, columns).view(n_out, n_rows)
    return y.view(1, n_out) if n_rows == 1 else y.t().contiguous()


def _in_turn(x: Tensor, weight: Tensor, block: int) -> Tensor:
    """Return x weight^T, one block of the weight's rows after the other, each converted to x's dtype."""
    n_rows, n_out = len(x), len(weight)
    if 1 < n_rows <= FEW_ROWS:
        y = x.new_empty(n_out, n_rows)
        for out, part in zip(y.split(block), weight.split(block), strict=True):
            torch.mm(part.to(x.dtype), x.t(), out=out)
        return y.t().contiguous()
    y = x.new_empty(n_rows, n_out)
    for out, part in zip(y.split(block, dim=1), weight.split(block), strict=True):
        torch.mm(x, part.to(x.dtype).t(), out=out)
    return y


@cache
def _divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most `most`."""
    return next(n for n in range(min(most, number), 0, -1) if number % n == 0)
