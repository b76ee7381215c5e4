"""The head's row kernels and operators against float64, beside what plain PyTorch makes of the same inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.workers.head import OBJECTIVE, linear_logprob, linear_policy_loss, sampled
from benchmarks.workers.head_inputs import DTYPES, Inputs, make
from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition, serve
from drpo.objectives import REGISTRY
from drpo.ops import rows
from drpo.ops import triton as kernels
from drpo.spec import parse_spec

SLACK = 3.0 if kernels.INTERPRETED else 2.0
FLOOR = 32 * torch.finfo(torch.float32).eps
"""A figure is right where its error is at most `SLACK` times the plain way's, plus `FLOOR`.

Rounding logits of size 20 to float32 moves log p by as many of its units, in either way, but not alike.
Triton's interpreter cuts bfloat16 off, where a GPU and PyTorch round it.
"""
SCALE = 1 / 0.6
Figures = dict[str, Tensor]


def relative(found: Figures, true: Figures) -> dict[str, float]:
    """Return the largest error of each figure, as a share of the largest true value.

    Example:
        >>> relative({"x": torch.tensor([1.0, 2.5])}, {"x": torch.tensor([1.0, 2.0])})
        {'x': 0.25}
    """
    return {n: float((found[n].double() - t).abs().max() / t.abs().max()) for n, t in true.items()}


def within(errors: Mapping[str, float], plain: Mapping[str, float]) -> bool:
    """Return whether no error is beyond what the plain way's allows; a NaN is.

    Example:
        >>> within({"x": 1e-7}, {"x": 1e-7}), within({"x": 1e-3}, {"x": 1e-4}), within({"x": float("nan")}, {"x": 1.0})
        (True, False, False)
    """
    return all(error <= SLACK * plain[name] + FLOOR for name, error in errors.items())


def of_rows(backend: Any, logits: Tensor, target: Tensor) -> Figures:
    """Return what the three row operations of a backend say; each overwrites its logits."""
    ones = torch.ones(len(target), device=logits.device)
    logp, entropy = backend.statistics(logits.clone(), target, SCALE)
    residual = backend.residual(logits.clone(), target, SCALE, logits.dtype)[0]
    slope = backend.slope(logits.clone(), target, SCALE, ones, 0.5 * ones, logits.dtype)
    return {"logp": logp, "entropy": entropy, "residual": residual, "slope": slope}


def true_rows(logits: Tensor, target: Tensor) -> Figures:
    """Return the same in float64, by autograd."""
    z = (logits.double() * SCALE).requires_grad_()
    log_p = torch.log_softmax(z, -1)
    logp, entropy = log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (residual,) = torch.autograd.grad(-logp.sum(), z, retain_graph=True)
    (slope,) = torch.autograd.grad((logp + 0.5 * entropy).sum(), z)
    return {"logp": logp.detach(), "entropy": entropy.detach(), "residual": residual, "slope": slope}


def logp_at_once(x: Inputs) -> Tensor:
    """Return log pi of the targets the usual way: all logits, log_softmax in float32 or wider, gather."""
    logits = x.hidden @ x.weight.T
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    return log_p.gather(-1, x.target[:, None])[:, 0]


def policy_gradient(x: Inputs) -> None:
    """Differentiate what `linear_logprob` of the head's benchmark does."""
    (-(logp_at_once(x) - x.behavior_logp).exp() * x.advantage).mean().backward()


def objective(x: Inputs) -> None:
    """Differentiate the objective that `linear_policy_loss` of the head's benchmark has."""
    tokens = sampled(x)
    (tokens.weight * parse_spec(OBJECTIVE, REGISTRY)(tokens.tokens(logp_at_once(x))).loss).sum().backward()


OPERATORS: Mapping[str, tuple[Callable[[Inputs], object], Callable[[Inputs], object]]] = {
    "linear_logprob": (linear_logprob, policy_gradient),
    "linear_policy_loss": (linear_policy_loss, objective),
}
"""Operator -> itself, and the usual way to the same gradients."""


def gradients(x: Inputs, work: Callable[[Inputs], object]) -> Figures:
    """Return the gradients of hidden states and weight."""
    x.hidden.grad = x.weight.grad = None
    work(x)
    assert x.hidden.grad is not None and x.weight.grad is not None
    return {"d hidden": x.hidden.grad, "d weight": x.weight.grad}


def wide(x: Inputs) -> Inputs:
    """Return the same inputs in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
    return Inputs(hidden, weight, x.target, x.behavior_logp.double(), x.advantage.double(), x.rows)


def compare(request: Mapping[str, Any]) -> Record:
    """Return the errors of a check's figures, the plain way's, and whether they are `within`.

    Args:
        request: "check": "rows" or a key of `OPERATORS`; "dtype", "tokens", "vocabulary", "hidden", "row".
    """
    if request["check"] == "rows":
        x = make({**request, "dtype": "fp32"})
        logits = (3 * (x.hidden @ x.weight.T)).detach().to(DTYPES[request["dtype"]])
        used = kernels if kernels.supported(logits.device) else rows
        true = true_rows(logits, x.target)
        found, plain = of_rows(used, logits, x.target), of_rows(rows, logits, x.target)
    else:
        x = make(request)
        wide_logits = x.hidden.is_cuda or x.hidden.dtype == torch.float32  # the kernels are asked for no others
        used = kernels if wide_logits and kernels.supported(x.hidden.device) else rows
        operator, usual = OPERATORS[request["check"]]
        true = gradients(wide(x), usual)
        found, plain = gradients(x, operator), gradients(x, usual)
    errors, of_plain = relative(found, true), relative(plain, true)
    backend = "triton" if used is kernels else "torch"
    return {"errors": errors, "plain": of_plain, "within": within(errors, of_plain), "backend": backend}


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Nothing to load; for a request see `compare`."""
    meter = Meter()

    def repetition(request: Mapping[str, Any]) -> Record:
        meter.start()
        return {**compare(request), **meter.stop()}

    versions = f"torch {torch.__version__.split('+')[0]}"
    return {"settings": versions}, repetition


if __name__ == "__main__":
    serve(prepare)
