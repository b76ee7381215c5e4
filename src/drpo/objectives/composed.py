"""Objectives made of others: a product with factors, and a weighted sum: `mask(0.1)*opsm(0.5) + 0.002*k2`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.objectives._check import require
from drpo.objectives.contract import Objective, require_objective, unchecked
from drpo.objectives.factors import Factor
from drpo.spec import Summand
from drpo.types import TokenLoss, Tokens


@dataclass(frozen=True)
class Product:
    """An objective times factors: rejection masks and importance weights.

        loss = M_1 ... M_k loss_0     d loss / d l = M_1 ... M_k d loss_0 / d l

    A token is out of the region where it is out of the objective's, or a factor rejects it.

    Args:
        objective: loss per token.
        factors: at least one.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: no objective, no factor, or a part that is neither.

    Example:
        >>> from drpo.objectives import Band, PPOClip
        >>> Product(PPOClip(), (Band(0.999, 1.001, "geometric"),)).tokenwise
        False

    Source: verl's rollout correction; its `rollout_rs` and `rollout_is` are factors.
    """

    objective: Objective
    factors: tuple[Factor, ...]

    def __post_init__(self) -> None:
        _require_plain(self.objective, "a factor of each term: 'mask(0.1)*opsm(0.5) + 0.002*k2'")
        if not self.factors or not all(hasattr(factor, "factor") for factor in self.factors):
            raise InputError(f"factors={self.factors!r}: write at least one, such as 'none*band(0.5, 5.0)'")

    @property
    def parts(self) -> tuple[Objective | Factor, ...]:
        """The objective, and its factors."""
        return (self.objective, *self.factors)

    @property
    def tokenwise(self) -> bool:
        """True if every part is."""
        return all(part.tokenwise for part in self.parts)

    @property
    def needs(self) -> frozenset[str]:
        """What any part needs."""
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def vanishes_at_zero_advantage(self) -> bool:
        """As of the objective."""
        return bool(getattr(self.objective, "vanishes_at_zero_advantage", False))

    def __call__(self, tokens: Tokens) -> TokenLoss:
        result = self.objective(tokens)
        with torch.no_grad():
            factor = prod((factor.factor(tokens) for factor in self.factors), start=torch.ones_like(result.loss))
        return TokenLoss(factor * result.loss, result.metrics)

    def of_batch(self, tokens: Tokens) -> "Product":
        """Return the product of the parts with the statistics of this batch."""
        return Product(_of_batch(self.objective, tokens), tuple(_of_batch(f, tokens) for f in self.factors))

    def out_of_region(self, tokens: Tokens) -> Tensor | None:
        """Return [T] bool: out of any part's region; None where no part has one."""
        return _any_left(self.parts, tokens)


@dataclass(frozen=True)
class Sum:
    """A weighted sum of objectives.

        loss = sum_k c_k loss_k

    Args:
        terms: at least one (c_k, objective), c_k > 0.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: no term, a weight that is not above 0, or a term that is no objective.

    Example:
        >>> from drpo.objectives import K2, SymmetricMask
        >>> Sum(((1.0, SymmetricMask(0.1)), (0.002, K2()))).vanishes_at_zero_advantage
        False

    Source: prime-rl's IPO and DPPO losses with kl_tau: a masked surrogate plus kl_tau (l - m)^2.
    """

    terms: tuple[tuple[float, Objective], ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise InputError("terms=(): a sum of objectives has no term; write 'mask(0.1) + 0.002*k2'")
        for weight, objective in self.terms:
            require("weight of a term", weight, above=0)
            _require_plain(objective, "one sum of all terms", Sum)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives of the terms."""
        return tuple(objective for _, objective in self.terms)

    @property
    def tokenwise(self) -> bool:
        """True if every term is."""
        return all(objective.tokenwise for objective in self.objectives)

    @property
    def needs(self) -> frozenset[str]:
        """What any term needs."""
        return frozenset().union(*(objective.needs for objective in self.objectives))

    @property
    def vanishes_at_zero_advantage(self) -> bool:
        """True if every term does."""
        return all(getattr(objective, "vanishes_at_zero_advantage", False) for objective in self.objectives)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        # So that the terms' gradients are added before they are rounded to 16 bits.
        logp = tokens.logp if tokens.logp.dtype == torch.float64 else tokens.logp.float()
        tokens = unchecked(**{**vars(tokens), "logp": logp})
        results = [(weight, objective(tokens)) for weight, objective in self.terms]
        metrics: dict[str, Tensor] = {}
        for _, result in results:
            metrics |= result.metrics
        return TokenLoss(reduce(torch.add, [weight * result.loss for weight, result in results]), metrics)

    def of_batch(self, tokens: Tokens) -> "Sum":
        """Return the sum of the terms with the statistics of this batch."""
        return Sum(tuple((weight, _of_batch(objective, tokens)) for weight, objective in self.terms))

    def out_of_region(self, tokens: Tokens) -> Tensor | None:
        """Return [T] bool: out of any term's region; None where no term has one."""
        return _any_left(self.objectives, tokens)


def _require_plain(objective: Objective, write: str, composed: type | tuple[type, ...] = ()) -> None:
    """Raise unless `objective` is one, and none that a spec could not name within this one."""
    require_objective(objective)
    if isinstance(objective, composed or (Product, Sum)):
        raise InputError(f"{type(objective).__name__} within another: write {write}")


def _of_batch(part: Any, tokens: Tokens) -> Any:
    """Return an objective or a factor with the statistics of the batch; one that reads none as it is."""
    return part.of_batch(tokens) if "batch" in part.needs else part


def _any_left(parts: Sequence[Any], tokens: Tokens) -> Tensor | None:
    regions: list[Callable[[Tokens], Tensor | None]] = [p.out_of_region for p in parts if hasattr(p, "out_of_region")]
    left = [outside for region in regions if (outside := region(tokens)) is not None]
    return reduce(torch.logical_or, left) if left else None


def of_summands(terms: Sequence[Summand[Any]]) -> Objective:
    """Return the objective of a spec such as `ppo(0.2, 0.2)*opsm(0.5) + 0.002*k2`.

    Raises:
        InputError: a product without an objective, or with several; a weight that is not above 0.

    Example:
        >>> from drpo.objectives import OPSM, PPOClip
        >>> of_summands([Summand((PPOClip(), OPSM(0.5)))])
        Product(objective=PPOClip(low=0.2, high=0.2, dual=None), factors=(OPSM(delta=0.5),))
    """
    products = [(term.weight, _product(term.factors)) for term in terms]
    return products[0][1] if len(products) == 1 and products[0][0] == 1 else Sum(tuple(products))


def _product(parts: Sequence[Any]) -> Objective:
    factors = tuple(part for part in parts if hasattr(part, "factor"))
    objectives = [part for part in parts if not hasattr(part, "factor")]
    if len(objectives) != 1:
        count = "none" if not objectives else str(len(objectives))
        raise InputError(
            f"a product of {', '.join(type(part).__name__ for part in parts)}: must have one objective, not {count}, "
            "and any factors: 'none*band(0.5, 5.0)'; objectives are added: 'mask(0.1) + 0.002*k2'"
        )
    return Product(objectives[0], factors) if factors else objectives[0]


def summands(objective: Any) -> Sequence[Summand[Any]] | None:
    """Return the terms of a sum or product; None for any other objective."""
    if isinstance(objective, Product):
        return [Summand(objective.parts)]
    if not isinstance(objective, Sum):
        return None
    return [Summand(o.parts if isinstance(o, Product) else (o,), weight) for weight, o in objective.terms]
