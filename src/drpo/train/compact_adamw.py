"""AdamW in less memory: moments in 8 bits, and weights in bfloat16 that are rounded stochastically."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from drpo.model.tables import kept
from drpo.seeds import derive

BLOCK = 256
"""Neighbours in a row whose moments share a scale."""

AT_ONCE = {"cpu": 2**18}
"""Weights that are updated at once, which bounds the float32 copies; elsewhere 2**24."""

EPS = 1e-8
"""Of the denominator, as in torch.optim.AdamW."""


class CompactAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with other number formats; with float32 weights and moments it takes the same steps.

    In 8 bits a moment is a code, one of 256 levels between -1 and 1 that lie denser near 0, times the largest magnitude
    of its block of 256 neighbours in a row. Of the second moment the root is held: its levels reach as far down as
    those of the first, so a small first moment is never divided by 0. Blocks lie within rows, so rows may be divided
    over processes. Vectors (norms, biases) keep float32 moments. The step itself is computed in float32.

    Weights in bfloat16 are rounded to one of their two neighbours, each with the probability that makes the mean of the
    rounding exact. The random numbers depend on the seed, the parameter's place and its step alone.

    Args:
        groups: parameters with their `weight_decay`.
        lr, betas: as for torch.optim.AdamW.
        eight_bits: moments of matrices in 8 bits; else in float32.
        seed: of stochastic rounding.

    Source: 8-bit moments, levels and blocks: Dettmers et al. 2022, arXiv 2110.02861; stochastic rounding of weights:
    Zamirai et al. 2020, arXiv 2010.06192.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eight_bits: bool,
        seed: int = 0,
    ) -> None:
        super().__init__([dict(group) for group in groups], {"lr": lr, "betas": betas, "weight_decay": 0.0})
        self.eight_bits, self.seed = eight_bits, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        settings = [(group, p) for group in self.param_groups for p in group["params"]]
        for place, (group, p) in enumerate(settings):
            if p.grad is not None:
                state = self.state[p]
                if not state:
                    state.update(self._zeros(p))
                state["step"] += 1
                self._update(place, group, p, p.grad.contiguous(), state)

    def _zeros(self, p: Tensor) -> dict[str, Tensor]:
        """Return a parameter's state before its first step."""
        state = {"step": torch.tensor(0.0)}
        for name, shape, dtype in self._moments(p):
            state[name] = _divided_as(p, shape, dtype)
        return state

    def _moments(self, p: Tensor) -> Iterator[tuple[str, Sequence[int], torch.dtype]]:
        """Yield name, whole shape and dtype of the tensors that hold a parameter's moments."""
        in_codes = self.eight_bits and p.ndim >= 2
        for name in ("exp_avg", "exp_avg_sq_root" if in_codes else "exp_avg_sq"):
            yield name, p.shape, torch.uint8 if in_codes else torch.float32
            if in_codes:
                yield f"{name}_scale", (*p.shape[:-1], -(-p.shape[-1] // BLOCK)), torch.float32

    def state_bytes(self) -> int:
        """Return the bytes of this rank's moments from the first step on."""
        parameters = (p for group in self.param_groups for p in group["params"])
        return sum(
            dtype.itemsize * math.prod((*_local(p).shape[:1], *shape[1:]))
            for p in parameters
            for _, shape, dtype in self._moments(p)
        )

    def _update(
        self, place: int, group: Mapping[str, Any], p: Tensor, gradient: Tensor, state: Mapping[str, Tensor]
    ) -> None:
        """Take a parameter's step, some of its rows at a time."""
        weights, gradients = _rows(p), _rows(gradient)
        moments = [_rows(state[name]) for name, *_ in self._moments(p)]
        steps, (beta1, beta2) = int(state["step"]), group["betas"]
        size, root = group["lr"] / (1 - beta1**steps), math.sqrt(1 - beta2**steps)
        generator = None
        if weights.dtype == torch.bfloat16:
            generator = torch.Generator(weights.device).manual_seed(derive(self.seed, place, steps))
        at_once = max(1, AT_ONCE.get(weights.device.type, 2**24) // max(1, weights.shape[1]))
        for start in range(0, len(weights), at_once):
            rows = slice(start, start + at_once)
            parts = [moment[rows] for moment in moments]
            slope = gradients[rows].float()
            mean, square = _read(parts)
            mean.lerp_(slope, 1 - beta1)
            square.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
            wide = weights[rows].float()  # the weights themselves, where they are float32
            wide.mul_(1 - group["lr"] * group["weight_decay"])
            wide.addcdiv_(mean, (square.sqrt() / root).add_(EPS), value=-size)
            if generator is not None:
                weights[rows] = round_stochastically(wide, generator)
            _write(parts, mean, square)


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return x, float32, in bfloat16: of its two neighbours there, each with the probability that keeps the mean.

    Args:
        x: finite.
        generator: of the random numbers, on x's device.

    Example:
        >>> x = torch.full((100_000,), 1 + 2**-10)  # neighbours: 1 and 1 + 2**-7
        >>> rounded = round_stochastically(x, torch.Generator().manual_seed(0))
        >>> sorted(set(rounded.tolist())), round(float(rounded.float().mean() - 1) * 2**10, 1)
        ([1.0, 1.0078125], 1.0)
    """
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # bfloat16 is the upper half of float32: noise below its last bit carries into it as often as it should.
    bits = (x.view(torch.int32) + noise).bitwise_and_(-(2**16))
    return bits.view(torch.float32).to(torch.bfloat16)


def _local(x: Any) -> Tensor:
    """Return this rank's rows of a tensor that may be divided (a DTensor, whose import takes a moment)."""
    local: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return local


def local_bytes(x: Tensor) -> int:
    """Return the bytes of this rank's rows of a tensor."""
    return _local(x).nbytes


def _rows(x: Any) -> Tensor:
    """Return this rank's part as [rows, columns], a view."""
    local = _local(x)
    return local.view(-1, local.shape[-1]) if local.ndim >= 2 else local.view(1, -1)


def _divided_as(p: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros of a whole shape, of which every rank has the rows that it has of a parameter."""
    local = _local(p)
    zeros = torch.zeros((*local.shape[:1], *shape[1:]), dtype=dtype, device=local.device)
    if local is p:
        return zeros
    stride = torch.empty(*shape, device="meta").stride()
    divided: Tensor = p.from_local(
        zeros, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return divided


def _read(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the two moments, float32 [rows, columns]; the tensors themselves where they are float32."""
    if len(parts) == 2:
        return parts[0], parts[1]
    mean, mean_scale, root, root_scale = parts
    return _dequantize(mean, mean_scale, signed=True), _dequantize(root, root_scale, signed=False).square_()


def _write(parts: Sequence[Tensor], mean: Tensor, square: Tensor) -> None:
    if len(parts) == 4:
        _quantize_into(parts[0], parts[1], mean, signed=True)
        _quantize_into(parts[2], parts[3], square.sqrt_(), signed=False)


@kept
def _levels(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 levels, ascending, float32.

    Seven decades, 10^-6 to 1, have 1, 2, ... 64 levels each (twice as many without a sign), between 0.1 and 1 of it.
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64)
        decades.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6))
    positive = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([ends, positive, -positive] if signed else [ends, positive]).sort().values.float().to(device)


@kept
def _codes(signed: bool, device: torch.device) -> Tensor:
    """Return the number of the level nearest to each bfloat16, by its bits, [2^16] uint8; a search takes longer."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    levels = _levels(signed, torch.device("cpu"))
    return torch.bucketize(numbers, (levels[1:] + levels[:-1]) / 2, right=True).to(torch.uint8).to(device)


def _dequantize(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """Return codes [R, C] times the scales [R, blocks] of their blocks, float32."""
    columns = codes.shape[1]
    return _levels(signed, codes.device)[codes.int()].mul_(scale.repeat_interleave(min(BLOCK, columns), 1)[:, :columns])


def _quantize_into(codes: Tensor, scale: Tensor, x: Tensor, *, signed: bool) -> None:
    """Write the codes and the scales of x [R, C], float32."""
    block = min(BLOCK, x.shape[1])
    blocks = pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    torch.amax(blocks.abs(), -1, out=scale)
    ratio = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    bits = ratio.to(torch.bfloat16).view(torch.int16).int().bitwise_and_(2**16 - 1)
    codes.copy_(_codes(signed, codes.device)[bits].flatten(1)[:, : x.shape[1]])
