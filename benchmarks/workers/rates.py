"""How fast this machine multiplies matrices, the measure of every floor."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.workers.measure import synchronize
from benchmarks.workers.protocol import Record, Repetition, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def flops_per_second(n: int, dtype: torch.dtype, tries: int) -> float:
    """Return the rate of the best of some products of two n x n matrices.

    Args:
        n: size of the matrices.
        dtype: of the matrices.
        tries: how many products.

    Returns:
        Floating-point operations per second, 2 n^3 of them to a product.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b, out = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(3))
    best = float("inf")
    for _ in range(tries):
        synchronize()
        begun = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """A request has "size" and "precision", since without hardware for it bf16 would take minutes."""

    def repetition(request: Mapping[str, Any]) -> Record:
        begun = time.perf_counter()
        precision = request["precision"]
        rate = flops_per_second(request["size"], DTYPES[precision], tries=4)
        return {"seconds": time.perf_counter() - begun, "rates": {precision: rate}}

    return {"settings": "best of 4 products of two square matrices"}, repetition


if __name__ == "__main__":
    serve(prepare)
