"""The stability benchmark: which trust region holds as updates grow staler, steps larger and samplers coarser."""

from collections.abc import Sequence

from drpo.lab.grid import Grid, parse_arm, runs
from drpo.lab.tail import Kind, base
from drpo.train.config import Run

OBJECTIVES = ("none", "ppo(0.2, 0.28)", "spo(3)", "dppo(0.15)", "drpo(12.5)", "drpo(0.2)")
KINDS: tuple[Kind, ...] = ("noise", "meaning")
UPDATES = (4, 16)
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
PRECISIONS = ("fp32", "fp8")


def stability_runs(
    objectives: Sequence[str] = OBJECTIVES,
    seeds: Sequence[int] = (0, 1),
    updates: Sequence[int] = UPDATES,
    learning_rates: Sequence[float] = LEARNING_RATES,
    precisions: Sequence[str] = PRECISIONS,
) -> list[Run]:
    """Return the runs of the benchmark: both tasks of `tail`, and every combination of what is given.

    Args:
        objectives: as `grid.parse_arm` reads them.
        seeds: of each.
        updates: optimiser updates per rollout: staleness.
        learning_rates: of each.
        precisions: of the sampler, beside a trainer in fp32: mismatch.

    Example:
        >>> len(stability_runs()), len({run.name for run in stability_runs()})
        (288, 288)
    """
    grid = Grid(
        arms=tuple(map(parse_arm, objectives)),
        seeds=tuple(seeds),
        learning_rates=tuple(learning_rates),
        regimes={"updates": tuple(updates), "rollout_precision": tuple(precisions)},
    )
    return [run for kind in KINDS for run in runs(base(kind), grid)]
