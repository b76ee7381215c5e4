"""Checks of a caller's tensors: each error names the argument, the value and the likely cause.

Shapes, dtypes and devices are always checked. Values are checked only on the CPU and only for kept tokens: reading them
would stall a GPU and break the tracing of `torch.compile` and `torch.func`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from drpo.errors import InputError

SAME = 1e-6
"""Relative tolerance of equality: a few roundings of float32."""


def all_equal(values: Tensor) -> bool:
    """Whether numbers are equal up to rounding: max - min <= 1e-6 max |values|; True for no numbers.

    Example:
        >>> all_equal(torch.tensor([0.1, 0.1, 0.1, 0.10000001])), all_equal(torch.tensor([0.1, 0.1001]))
        (True, False)
    """
    if values.numel() == 0:
        return True
    low, high = (float(x) for x in values.double().aminmax())
    return high - low <= SAME * max(abs(low), abs(high))


class _Kind(NamedTuple):
    """The rules of a column: its dtype, and which values are wrong."""

    dtype: str
    shape_cause: str
    wrong: Callable[[Tensor], Tensor] | None = None
    rule: str = ""


def _positive(values: Tensor) -> Tensor:
    """Return where a log-probability is NaN or positive beyond rounding; -inf is a probability of 0."""
    return ~(values <= slack(values.dtype))


def slack(dtype: torch.dtype) -> float:
    """Return how far above 0 rounding may put a log-probability of this dtype."""
    return max(1e-4, 8 * torch.finfo(dtype).eps)


_LOGP = _Kind("float", "", _positive, "a log-probability is at most 0; are these probabilities? then take .log()")
_KINDS: Mapping[str, _Kind] = {
    "logp": _LOGP,
    "behavior_logp": _LOGP,
    "proximal_logp": _LOGP,
    "reference_logp": _LOGP,
    "advantage": _Kind(
        "float", "one value per sequence? write advantage[sequence]", lambda v: ~v.isfinite(), "must be finite"
    ),
    "score": _Kind("float", "one value per sequence? write score[sequence]", lambda v: ~v.isfinite(), "must be finite"),
    "divergence": _Kind("float", "", lambda v: ~(v >= 0), "a divergence is at least 0"),
    "weight": _Kind(
        "float",
        "drpo.reductions build one for each token",
        lambda v: ~(v.isfinite() & (v >= 0)),
        "must be finite and at least 0; the sign belongs to the advantage",
    ),
    "keep": _Kind("bool", ""),
    "position": _Kind("int", "it sorts the tokens of one sequence"),
    "sequence": _Kind("int", "it numbers the completion of every token, not the completions"),
}


def require_columns(where: str, columns: Mapping[str, Tensor], like: tuple[str, Tensor], keep: Tensor | None) -> None:
    """Raise unless every column fits `like` and its kept values are valid.

    Args:
        where: the prefix of a column's name in messages, such as "tokens.".
        columns: name -> [T]; names of `Tokens`' fields, or "weight".
        like: name and tensor [T] with the required shape and device.
        keep: [T] bool, selects the values to check; None checks all.

    Raises:
        InputError: one line.
    """
    first, model = like
    for name, values in columns.items():
        kind = _KINDS[name]
        if not isinstance(values, Tensor):
            raise InputError(f"{where}{name}: must be a tensor, not {type(values).__name__}")
        if model.ndim != 1:
            raise InputError(
                f"{where}{first} {list(model.shape)}: must be [T], one number for each token; flatten every column "
                "with .reshape(-1), or select the tokens with a mask"
            )
        if values.shape != model.shape:
            cause = f" ({kind.shape_cause})" if kind.shape_cause else ""
            raise InputError(f"{where}{name} {list(values.shape)}: must be {list(model.shape)}, as {first}{cause}")
        if _dtype(values) != kind.dtype:
            fix = {"bool": ".bool()", "int": ".long()", "float": ".float()"}[kind.dtype]
            raise InputError(f"{where}{name} {values.dtype}: must be {kind.dtype}; write {name}{fix}")
        if values.layout != torch.strided:
            raise InputError(f"{where}{name} {values.layout}: must be dense; write {name}.to_dense()")
        if values.device != model.device:
            raise InputError(f"{where}{name} is on {values.device}, {first} on {model.device}: move it with .to(...)")
    if all(map(_readable, columns.values())):
        _require_values(where, columns, keep)


def _dtype(values: Tensor) -> str:
    if values.is_floating_point():
        return "float"
    return "bool" if values.dtype == torch.bool else "complex" if values.is_complex() else "int"


def _readable(values: Tensor) -> bool:
    """Whether values can be read without a device sync and without breaking a trace."""
    plain = values.device.type == "cpu" and type(values) in (Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(values)


@torch.no_grad()
def _require_values(where: str, columns: Mapping[str, Tensor], keep: Tensor | None) -> None:
    for name, values in columns.items():
        kind = _KINDS[name]
        if kind.wrong is None:
            continue
        wrong = kind.wrong(values) if keep is None else kind.wrong(values) & keep
        if wrong.any():
            at = int(wrong.nonzero()[0])
            n = f" ({int(wrong.sum())} of {len(values)} so)" if int(wrong.sum()) > 1 else ""
            raise InputError(f"{where}{name}[{at}]={float(values[at]):.6g}{n}: {kind.rule}")
