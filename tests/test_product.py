"""Every way to multiply on a CPU is the product, of float weights and of int8 ones. Not covered: speed."""

import pytest
import torch
from torch import nn

from drpo.model import product as ways
from drpo.model.product import product

ROWS = [1, 2, ways.FEW_ROWS, ways.FEW_ROWS + 1, ways.SOME_ROWS, ways.SOME_ROWS + 1]


@pytest.mark.parametrize("rows", [0, *ROWS])
@pytest.mark.parametrize("n_out", [30, 31, ways.WIDE, 2 * ways.WIDE + 7])
@pytest.mark.parametrize("has_bias", [True, False])
def test_each_way_to_multiply_is_the_product(rows: int, n_out: int, has_bias: bool) -> None:
    x, weight = torch.randn(rows, 24), torch.randn(n_out, 24)
    bias = torch.randn(n_out) if has_bias else None
    kept = weight.clone()
    y = product(x, weight, bias)
    assert y.is_contiguous() and torch.equal(weight, kept)
    torch.testing.assert_close(y, nn.functional.linear(x, weight, bias), rtol=0, atol=1e-4)


def test_fewer_outputs_than_threads_and_none() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for n_out, n_in in ((2, 24), (3, 24), (0, 24), (2, 0)):
            x, weight = torch.randn(6, n_in), torch.randn(n_out, n_in)
            y = product(x, weight)
            assert y.is_contiguous()
            torch.testing.assert_close(y, nn.functional.linear(x, weight), rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [0, *ROWS])
@pytest.mark.parametrize("n_out", [1, 30, 71])
@pytest.mark.parametrize("has_bias", [True, False])
def test_an_int8_weight_is_multiplied_exactly(
    rows: int, n_out: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 7 outputs, the last of them smaller; of inputs whose sums of products are whole in float32."""
    monkeypatch.setattr(ways, "CONVERTED", 7 * 24 + 23)
    x, weight = torch.randint(-999, 1000, (rows, 24)), torch.randint(-128, 128, (n_out, 24), dtype=torch.int8)
    bias = torch.randint(-9, 10, (n_out,)) if has_bias else None
    y = product(x.float(), weight, None if bias is None else bias.float())
    assert y.is_contiguous() and y.dtype == torch.float32
    assert torch.equal(y.long(), x @ weight.long().T + (0 if bias is None else bias))


def test_rows_longer_than_a_block_are_multiplied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "CONVERTED", 3)
    x, weight = torch.arange(8.0).view(2, 4), torch.arange(-10, 10, dtype=torch.int8).view(5, 4)
    assert torch.equal(product(x, weight), x @ weight.float().T)
