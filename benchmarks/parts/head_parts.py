"""The head with a bias, a scale and a soft cap, beside the weight alone."""

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.parts.scale import Scale

SIZE = {"tokens": 512, "vocabulary": 49_152, "hidden": 576, "row": 512}
QUICK_SIZE = {"tokens": 64, "vocabulary": 512, "hidden": 32, "row": 64}
PARTS = ("bias", "scale", "soft cap", "all")
OPERATORS = ("linear_policy_loss", "linear_logprob")
WEIGHT = "the weight alone"


def cases(scale: Scale) -> list[Case]:
    """Return a case for each precision and operator.

    Args:
        scale: of the machine.
    """
    return [_case(scale, dtype, operator) for dtype in scale.precisions for operator in OPERATORS]


def _case(scale: Scale, dtype: str, operator: str) -> Case:
    size = {**(QUICK_SIZE if scale.quick else SIZE), "dtype": dtype}
    methods = {WEIGHT: operator, **{part: f"{operator}, {part}" for part in PARTS}}
    worker = Worker(OURS, "head", {})
    entrants = tuple(Entrant(name, worker, {**size, "method": method}) for name, method in methods.items())
    return Case("head_parts", f"{operator}, {dtype}, T {size['tokens']:,}", WEIGHT, entrants, size)
