"""The fused head with objectives that read a sequence or the batch, beside one of single tokens."""

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.parts.scale import Scale

SIZE = {"tokens": 2_048, "vocabulary": 49_152, "hidden": 576, "row": 512}
QUICK_SIZE = {"tokens": 64, "vocabulary": 512, "hidden": 32, "row": 64}
TOKENWISE = "drpo(0.2)"
SPECS = (
    TOKENWISE,
    "drpo(0.2)*band(0.5, 5.0)",
    "gspo",
    "cppo",
    "vespo",
    "drpo(0.2)*reject('seq_mean_k3', 0.01)",
    "m2po",
    "kl_cov",
)
"""Single tokens; sequences; the batch."""


def cases(scale: Scale) -> list[Case]:
    """Return a case for each precision.

    Args:
        scale: of the machine.
    """
    return [_case(scale, dtype) for dtype in scale.precisions]


def _case(scale: Scale, dtype: str) -> Case:
    size = {**(QUICK_SIZE if scale.quick else SIZE), "dtype": dtype}
    worker = Worker(OURS, "head", {})
    entrants = tuple(Entrant(spec, worker, {**size, "method": f"objective {spec}"}) for spec in SPECS)
    return Case("head_objectives", f"{dtype}, T {size['tokens']:,}", TOKENWISE, entrants, size)
