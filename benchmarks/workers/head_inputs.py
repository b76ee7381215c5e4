"""What every way of computing the head is given; standard library and torch only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Inputs:
    """T tokens of a batch at the head.

    Args:
        hidden: [T, H], wants a gradient.
        weight: [V, H], wants a gradient.
        target: [T] int64.
        behavior_logp: [T] float32.
        advantage: [T] float32, equal within a row.
        rows: how many completions of equal length the T tokens are.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    rows: int

    @property
    def sequence(self) -> Tensor:
        """[T] int64: which completion each token belongs to."""
        n = len(self.target)
        return torch.arange(self.rows, device=self.target.device).repeat_interleave(n // self.rows)


def make(case: Mapping[str, Any]) -> Inputs:
    """Return random inputs, the same for equal cases.

    Args:
        case: "tokens" T, "vocabulary" V, "hidden" H, "dtype", "row" (tokens per completion, divides T).

    Returns:
        Logits of size about 1, so that no softmax is degenerate, and a behaviour close to the policy.
    """
    t, v, h = case["tokens"], case["vocabulary"], case["hidden"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden = torch.randn(t, h, device=device)
    weight = torch.randn(v, h, device=device).mul_(h**-0.5)
    target = torch.randint(0, v, (t,), device=device)
    # Mean of logsumexp over standard normal logits is log V + 1/2.
    logp = (hidden * weight[target]).sum(-1) - torch.tensor(float(v)).log().item() - 0.5
    rows = max(1, t // case["row"])
    return Inputs(
        hidden.to(DTYPES[case["dtype"]]).requires_grad_(),
        weight.to(DTYPES[case["dtype"]]).requires_grad_(),
        target,
        (logp + 0.05 * torch.randn(t, device=device)).clamp(max=0),
        torch.randn(rows, device=device).repeat_interleave(t // rows),
        rows,
    )


class Latest:
    """Keeps what was made for the last case, and lets go of it before it makes the next."""

    def __init__(self) -> None:
        self._case: dict[str, Any] = {}
        self._inputs: Inputs | None = None

    def __call__(self, case: Mapping[str, Any]) -> Inputs:
        """Return the inputs of a case."""
        wanted = {name: case[name] for name in ("tokens", "vocabulary", "hidden", "dtype", "row")}
        if self._inputs is None or wanted != self._case:
            self._inputs = None
            self._inputs, self._case = make(wanted), wanted
        return self._inputs


def repeated(methods: Mapping[str, Callable[[Inputs], object]]) -> Repetition:
    """Return a repetition that measures a request's "method" on its inputs.

    Args:
        methods: name -> one forward and backward pass.

    Returns:
        A function for `protocol.serve`; gradients of the repetition before are dropped outside of the measurement.
    """
    latest, meter = Latest(), Meter()

    def repetition(request: Mapping[str, Any]) -> Record:
        inputs, work = latest(request), methods[request["method"]]
        inputs.hidden.grad = inputs.weight.grad = None
        meter.start()
        work(inputs)
        return {**meter.stop(), "tokens": len(inputs.target)}

    return repetition
