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
from drpo.objectives.contract import Objective, around_proximal, require_objective, unchecked
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
        if not self.factors:
            raise InputError("factors=(): write at least one, such as 'none*band(0.5, 5.0)'")
        _require_factors(self.factors)

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
        return TokenLoss(_factor(self.factors, tokens) * result.loss, result.metrics)

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


@dataclass(frozen=True)
class Proximal:
    """The anchor of a decoupled objective, within a spec: `ppo(0.2, 0.2)*proximal*weight('token', 5)`; see `Decoupled`.

    Example:
        >>> Proximal()
        Proximal()
    """

    def factor(self, tokens: Tokens) -> Tensor:
        """Raise: it is no factor by itself."""
        raise InputError("proximal is no factor by itself: objectives.Decoupled(objective, factors)")


@dataclass(frozen=True)
class Decoupled:
    """An objective held to the proximal policy, times factors between the proximal policy and the sampler.

        loss = M(p, m) loss_0(l, p),   p = proximal_logp

    The proximal policy is the policy itself when the rollout arrived. PPO's clip then bounds how far the updates move
    it, whatever the sampler's age or precision, and a weight of b = e^(p - m) corrects for the sampler. It takes a
    forward pass more for every rollout. With p = m it is the objective without it, its factors being 1.

    Args:
        objective: loss per token, with p in place of m; its own factors compare l with p.
        factors: compare p with m; none is AReaL's loss without rejection sampling, which ignores the sampler.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: an objective or a factor that is none; on a call, `tokens.proximal_logp` is missing.

    Example:
        >>> from drpo.objectives import ImportanceWeight, PPOClip
        >>> sorted(Decoupled(PPOClip(), (ImportanceWeight("token", cap=5.0),)).needs)
        ['proximal_logp']

    Source: arXiv 2110.00641; for language models AReaL, 2505.24298.
    """

    objective: Objective
    factors: tuple[Factor, ...] = ()

    def __post_init__(self) -> None:
        _require_plain(self.objective, "one 'proximal' in each term", (Sum, Decoupled))
        _require_factors(self.factors)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The objective and its own factors, the anchor, and the factors between proximal policy and sampler."""
        inner = self.objective.parts if isinstance(self.objective, Product) else (self.objective,)
        return (*inner, Proximal(), *self.factors)

    @property
    def tokenwise(self) -> bool:
        """True if every part is."""
        return self.objective.tokenwise and all(factor.tokenwise for factor in self.factors)

    @property
    def needs(self) -> frozenset[str]:
        """The proximal policy, and what any part needs."""
        return frozenset({"proximal_logp"}).union(self.objective.needs, *(factor.needs for factor in self.factors))

    @property
    def vanishes_at_zero_advantage(self) -> bool:
        """As of the objective."""
        return bool(getattr(self.objective, "vanishes_at_zero_advantage", False))

    def __call__(self, tokens: Tokens) -> TokenLoss:
        near, far = around_proximal(tokens)
        result = self.objective(near)
        return TokenLoss(_factor(self.factors, far) * result.loss, result.metrics)

    def of_batch(self, tokens: Tokens) -> "Decoupled":
        """Return the same of the parts with the statistics of this batch."""
        near, far = around_proximal(tokens)
        return Decoupled(_of_batch(self.objective, near), tuple(_of_batch(factor, far) for factor in self.factors))

    def out_of_region(self, tokens: Tokens) -> Tensor | None:
        """Return [T] bool: out of the objective's region around the proximal policy, or rejected."""
        near, far = around_proximal(tokens)
        left = [_any_left((self.objective,), near), _any_left(self.factors, far)]
        known = [outside for outside in left if outside is not None]
        return reduce(torch.logical_or, known) if known else None


def _factor(factors: Sequence[Factor], tokens: Tokens) -> Tensor | int:
    """Return the product of the factors, [T], a constant; 1 without factors."""
    with torch.no_grad():
        return prod(factor.factor(tokens) for factor in factors)


def _require_factors(factors: Sequence[Any]) -> None:
    for factor in factors:
        if not hasattr(factor, "factor") or isinstance(factor, Proximal):
            raise InputError(f"factors={factors!r}: must be factors, such as Band(0.5, 5.0)")


def _require_plain(objective: Objective, write: str, composed: type | tuple[type, ...] = ()) -> None:
    """Raise unless `objective` is one, and none that a spec could not name within this one."""
    require_objective(objective)
    if isinstance(objective, composed or (Product, Sum, Decoupled)):
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
        Product(objective=PPOClip(low=0.2, high=0.2, dual=None, max_ratio=None), factors=(OPSM(delta=0.5),))
    """
    products = [(term.weight, _product(term.factors)) for term in terms]
    return products[0][1] if len(products) == 1 and products[0][0] == 1 else Sum(tuple(products))


def _product(parts: Sequence[Any]) -> Objective:
    anchors = [i for i, part in enumerate(parts) if isinstance(part, Proximal)]
    if len(anchors) == 1:
        inner, factors = parts[: anchors[0]], tuple(parts[anchors[0] + 1 :])
        return Decoupled(_product(inner), factors)
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
    if isinstance(objective, Product | Decoupled):
        return [Summand(objective.parts)]
    if not isinstance(objective, Sum):
        return None
    return [Summand(o.parts if isinstance(o, Product | Decoupled) else (o,), weight) for weight, o in objective.terms]
