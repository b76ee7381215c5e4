"""Products with a weight on a CPU, by the fastest way for the number of rows."""

import torch
from torch import Tensor
from torch.nn.functional import linear

FEW_ROWS = 8
"""Up to so many rows, and more than one, a float32 product is faster with the weight on the left."""

WIDE, BLOCK = 2048, 512
"""With more rows a float32 product of at least so many outputs is faster in blocks that stay in the cache."""

CONVERTED = 2**18
"""So many numbers of an int8 weight are converted at once: they stay in the cache."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias in x's dtype; how it is rounded may depend on the number of rows.

    An int8 weight is converted block by block, so that no copy of the whole is written to memory.

    Args:
        x: [B, in], float.
        weight: [out, in], of x's dtype or int8.
        bias: [out] or None.

    Returns:
        [B, out], contiguous.

    Example:
        >>> product(torch.tensor([[0.5, 2.0]]), torch.tensor([[2, 1], [0, -1]], dtype=torch.int8))
        tensor([[ 3., -2.]])
    """
    n_rows, n_out = len(x), len(weight)
    few = 1 < n_rows <= FEW_ROWS and x.dtype == torch.float32
    if weight.dtype == torch.int8:
        block = max(1, CONVERTED // weight.shape[1])
    elif few:
        block = n_out
    elif x.dtype == torch.float32 and n_rows > 1 and n_out >= WIDE:
        block = BLOCK
    else:
        return linear(x, weight, bias)
    if few:
        y = x.new_empty(n_out, n_rows)
        for out, part in zip(y.split(block), weight.split(block), strict=True):
            torch.mm(part.to(x.dtype), x.t(), out=out)
        y = y.t().contiguous()
    else:
        y = x.new_empty(n_rows, n_out)
        for out, part in zip(y.split(block, dim=1), weight.split(block), strict=True):
            torch.mm(x, part.to(x.dtype).t(), out=out)
    return y if bias is None else y.add_(bias)
