"""The head by this project's operators, by plain autograd, and as the three matrix products alone."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.parts.head_objectives import SPECS
from benchmarks.workers.head_inputs import Inputs, repeated
from benchmarks.workers.protocol import Record, Repetition, serve
from drpo import ops
from drpo.objectives import REGISTRY
from drpo.spec import parse_spec

OBJECTIVE = "drpo(0.2)"
LOGITS_AT_ONCE = 2**31
"""Bytes of logits that the matrix products alone are given room for; longer inputs go through in pieces."""


def linear_logprob(x: Inputs, part: str = "") -> None:
    """`drpo.ops.linear_logprob`, then the gradient of a policy-gradient loss."""
    logp = ops.linear_logprob(x.hidden, head(x, part), x.target)[0]
    (-(logp - x.behavior_logp).exp() * x.advantage).mean().backward()


def linear_policy_loss(x: Inputs, part: str = "", spec: str = OBJECTIVE) -> None:
    """`drpo.ops.linear_policy_loss` with an objective."""
    ops.linear_policy_loss(x.hidden, head(x, part), sampled(x), parse_spec(spec, REGISTRY)).loss.backward()


def sampled(x: Inputs) -> ops.SampledTokens:
    """Return the tokens, all trained, with equal weights."""
    return ops.SampledTokens(
        target=x.target,
        behavior_logp=x.behavior_logp,
        advantage=x.advantage,
        keep=torch.ones_like(x.target, dtype=torch.bool),
        sequence=x.sequence,
        weight=torch.full_like(x.advantage, 1 / len(x.target)),
    )


def head(x: Inputs, part: str) -> ops.Head:
    """The weight alone, or with a "bias", a "scale", a "soft cap", or "all" of them."""
    bias = torch.zeros_like(x.weight[:, 0], requires_grad=True) if part in ("bias", "all") else None
    return ops.Head(
        x.weight, bias, 0.5 if part in ("scale", "all") else 1.0, 30.0 if part in ("soft cap", "all") else None
    )


def log_softmax(x: Inputs) -> None:
    """The usual way: all logits, log_softmax in float32, gather, autograd."""
    logp = torch.log_softmax((x.hidden @ x.weight.T).float(), dim=-1).gather(-1, x.target[:, None])[:, 0]
    (-(logp - x.behavior_logp).exp() * x.advantage).mean().backward()


class Products:
    """The three matrix products that no exact gradient can do without: logits, d hidden, d weight; results are dropped.

    Where the logits are larger than `LOGITS_AT_ONCE`, tokens go through in pieces of equal shape.
    """

    def __init__(self) -> None:
        self._for: Inputs | None = None

    def __call__(self, x: Inputs) -> None:
        """Multiply."""
        if self._for is not x:
            self._allocate(x)
        hidden, weight = x.hidden.detach(), x.weight.detach()
        for piece in hidden.split(len(self._logits)):
            torch.mm(piece, weight.T, out=self._logits)
            torch.mm(self._logits, weight, out=self._grad_hidden)
            torch.mm(self._logits.T, piece, out=self._grad_weight)

    def _allocate(self, x: Inputs) -> None:
        row = len(x.weight) * x.weight.element_size()
        size = len(x.hidden)
        while size > 1 and size % 2 == 0 and size * row > LOGITS_AT_ONCE:
            size //= 2
        self._for = x
        # Written once, so that no page is touched for the first time while the clock runs.
        self._logits = torch.zeros(size, len(x.weight), dtype=x.weight.dtype, device=x.weight.device)
        self._grad_hidden = torch.zeros_like(x.hidden[:size], requires_grad=False)
        self._grad_weight = torch.zeros_like(x.weight, requires_grad=False)


OPERATORS: Mapping[str, Callable[..., object]] = {
    "linear_logprob": linear_logprob,
    "linear_policy_loss": linear_policy_loss,
}
METHODS: Mapping[str, Callable[[Inputs], object]] = {
    **OPERATORS,
    **{
        f"{name}, {p}": partial(f, part=p)
        for name, f in OPERATORS.items()
        for p in ("bias", "scale", "soft cap", "all")
    },
    **{f"objective {spec}": partial(linear_policy_loss, spec=spec) for spec in SPECS},
    "log_softmax": log_softmax,
    "products": Products(),
}


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Nothing to load; a request names its "method"."""
    return {"settings": f"torch {torch.__version__.split('+')[0]}"}, repeated(METHODS)


if __name__ == "__main__":
    serve(prepare)
