"""The grid of a comparison, and the run of every trial."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from drpo.errors import InputError
from drpo.methods import parse_objective
from drpo.objectives import REGISTRY, Objective
from drpo.spec import format_spec, parse_spec
from drpo.train.config import REGISTRIES, Run, configure, to_json

REGIME = ("task", "updates", "sync_every", "async_steps", "rollout_precision")
"""The regime: fields of a run that a comparison may vary besides objective, learning rate and seed."""


@dataclass(frozen=True)
class Variant:
    """An objective and its learning rates.

    Args:
        objective: the objective.
        learning_rates: for this objective; empty takes the grid's.
    """

    objective: Objective
    learning_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Grid:
    """The values that a comparison varies; every combination is a trial. An empty entry keeps the recipe's value.

    Args:
        variants: at least one.
        seeds: of each variant; each fixes the data order, the random numbers and the evaluation problems.
        learning_rates: for variants without learning rates.
        regimes: field of `REGIME` -> values.

    Raises:
        InputError: no objective, no seed, a duplicate, or a field that is not part of a regime.
    """

    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = ()
    regimes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in (("objectives", self.variants), ("seeds", self.seeds)):
            if not values:
                raise InputError(f"{name}: name at least one")
            if len(set(values)) < len(values):
                twice = next(value for i, value in enumerate(values) if value in values[:i])
                shown = format_spec(twice.objective, REGISTRY) if isinstance(twice, Variant) else twice
                raise InputError(f"{name}: {shown} is named twice; leave one out")
        unknown = set(self.regimes) - set(REGIME)
        if unknown:
            raise InputError(f"a regime has {', '.join(REGIME)}; not {', '.join(sorted(unknown))}")


def parse_variant(text: str) -> Variant:
    """Parse an objective, optionally followed by @ and its learning rates.

    Raises:
        InputError: an invalid objective, or a learning rate that is not a number.

    Example:
        >>> parse_variant("drpo(0.2) @ 1e-5 2e-5").learning_rates
        (1e-05, 2e-05)
    """
    spec, _, rates = text.partition("@")
    try:
        return Variant(
            parse_objective(spec.strip()),
            tuple(float(r) for r in re.split(r"[,\s]+", rates.strip()) if r),
        )
    except InputError:
        raise
    except ValueError:
        raise InputError(f"objectives: {text!r}: learning rates must follow the @, such as 1e-5 2e-5") from None


def runs(base: Run, grid: Grid) -> list[Run]:
    """Return the run of every trial, with distinct names.

    Trials are ordered by seed, so an interrupted comparison has complete seeds.

    Args:
        base: the run that they share.
        grid: the values that differ.

    Raises:
        InputError: a value that the run rejects.

    Example:
        >>> from drpo.recipes.addition import smoke
        >>> variants = (parse_variant("none"), parse_variant("drpo(0.2) @ 1e-3"))
        >>> grid = Grid(variants, seeds=(0, 1), learning_rates=(1e-4, 2e-4))
        >>> [r.name.rsplit("-", 1)[0] for r in runs(smoke(), grid)][:4]
        ['none-0', 'none-0', 'drpo_0.2-0', 'none-1']
    """
    trials = []
    names = [name for name in REGIME if grid.regimes.get(name)]
    for seed, values in itertools.product(grid.seeds, itertools.product(*(grid.regimes[name] for name in names))):
        regime = dict(zip(names, values, strict=True))
        for variant in grid.variants:
            for rate in variant.learning_rates or grid.learning_rates or (base.optimizer.policy.learning_rate,):
                run = configure(base, **regime, objective=variant.objective, learning_rate=rate, seed=seed)
                trials.append(replace(run, name=_name(run)))
    return trials


def _name(run: Run) -> str:
    """Return a trial's folder name: a readable part, then a hash that identifies the run."""
    record = to_json(run)
    del record["name"]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:6]
    objective = re.sub(r"[^A-Za-z0-9.=-]+", "_", format_spec(run.objective.loss, REGISTRY)).strip("_")
    return f"{objective}-{run.seed}-{digest}"


def differing(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the fields that differ between configurations, in order.

    Example:
        >>> differing([{"seed": 0, "steps": 4}, {"seed": 1, "steps": 4}])
        ['seed']
    """
    return [name for name in (records[0] if records else {}) if any(r.get(name) != records[0][name] for r in records)]


def parse_regime(name: str, texts: Sequence[str]) -> tuple[Any, ...]:
    """Parse the values of a regime's field from the command line.

    Raises:
        InputError: an invalid value.

    Example:
        >>> parse_regime("updates", ["1", "8"]), parse_regime("rollout_precision", ["int8"])
        ((1, 8), ('int8',))
    """
    if name in REGISTRIES:
        return tuple(parse_spec(text, REGISTRIES[name]) for text in texts)
    if name == "rollout_precision":
        return tuple(texts)
    try:
        return tuple(int(text) for text in texts)
    except ValueError:
        raise InputError(f"{name}={' '.join(texts)}: must be whole numbers") from None
