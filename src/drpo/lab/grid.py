"""What a comparison varies, and the run of every trial."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from drpo.errors import InputError
from drpo.objectives import REGISTRY, Objective
from drpo.spec import format_spec, parse_spec
from drpo.train.config import REGISTRIES, Run, configure, to_json

REGIME = ("task", "updates", "sync_every", "async_steps", "rollout_precision")
"""Fields of a run that a comparison may vary besides objective, learning rate and seed: together, the regime."""


@dataclass(frozen=True)
class Variant:
    """An objective with the learning rates to try it at.

    Args:
        objective: any.
        learning_rates: its own; none takes the grid's.
    """

    objective: Objective
    learning_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Grid:
    """What a comparison varies; every combination is a trial. An empty entry stays as in the recipe.

    Args:
        variants: at least one.
        seeds: of each; the data order, the random numbers and the evaluation problems follow from them.
        learning_rates: for variants without their own.
        regimes: field of `REGIME` -> values.

    Raises:
        InputError: no objective or no seed, or one twice, or a field that is no part of a regime.
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
    """Read an objective, and behind an @ its own learning rates.

    Raises:
        InputError: an objective that cannot be read, or a learning rate that is no number.

    Example:
        >>> parse_variant("drpo(0.2) @ 1e-5 2e-5").learning_rates
        (1e-05, 2e-05)
    """
    spec, _, rates = text.partition("@")
    try:
        return Variant(
            parse_spec(spec.strip(), REGISTRY),
            tuple(float(r) for r in re.split(r"[,\s]+", rates.strip()) if r),
        )
    except InputError:
        raise
    except ValueError:
        raise InputError(f"objectives: {text!r}: behind the @ stand learning rates, such as 1e-5 2e-5") from None


def runs(base: Run, grid: Grid) -> list[Run]:
    """Return the run of every trial, each with a name of its own.

    Trials of a seed come together, so that an interrupted comparison has whole seeds.

    Args:
        base: what they share.
        grid: what they differ by.

    Raises:
        InputError: a value that a field of the run refuses.

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
    """A folder's name: what one looks for first, then what makes it the same run if and only if it is."""
    record = to_json(run)
    del record["name"]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:6]
    objective = re.sub(r"[^A-Za-z0-9.=-]+", "_", format_spec(run.objective.loss, REGISTRY)).strip("_")
    return f"{objective}-{run.seed}-{digest}"


def differing(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the fields that are not the same in all of some configurations, in their order.

    Example:
        >>> differing([{"seed": 0, "steps": 4}, {"seed": 1, "steps": 4}])
        ['seed']
    """
    return [name for name in (records[0] if records else {}) if any(r.get(name) != records[0][name] for r in records)]


def parse_regime(name: str, texts: Sequence[str]) -> tuple[Any, ...]:
    """Read the values of a regime's field as they are written on the command line.

    Raises:
        InputError: a value that cannot be read.

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
