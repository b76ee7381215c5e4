"""A weighted sum of rewards, and of their products; each term is a part of the result."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import count
from math import prod
from typing import Any, TypeAlias

from drpo.errors import InputError
from drpo.rewards.contract import Reward, ScoreError, reads_transcript
from drpo.rewards.scoring import Scored, call
from drpo.rewards.usage import total
from drpo.spec import Summand
from drpo.types import Failure, Problem, RewardResult, Transcript
from drpo.types.problem import is_reward, not_a_reward

Turn: TypeAlias = float | tuple[float, ...]


@dataclass(frozen=True)
class WeightedSum:
    """Return sum_k w_k R_k, with each R_k as a part of the result: `--reward 'math_verify + 0.2*format'`.

    R_k is a reward, or a product of rewards: `0.2*math_verify*length(256)` rewards brevity of right answers alone. A
    reward of several terms is called once. Where a reward fails or abstains, so does the sum.

    Args:
        terms: at least one; a weight may be negative, or 0, which only records the part.

    Raises:
        InputError: no term, all weights 0, or a part that is no reward.

    Example:
        >>> from drpo.rewards import Length, exact_number
        >>> short = WeightedSum((Summand((exact_number,)), Summand((exact_number, Length(20, start=10)), 0.5)))
        >>> answer = Transcript("0", (), "It is 2.", "stop", turns=(12,))
        >>> result = short(Problem.of_text("0", "1 + 1?", "2"), answer)
        >>> result.total, result.parts
        (1.4, {'exact_number': 1.0, 'exact_number*length': 0.8})
    """

    terms: tuple[Summand[Reward], ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise InputError("a sum of rewards has no term; write 'math_verify + 0.2*format'")
        if not any(term.weight for term in self.terms):
            raise InputError(f"a sum of rewards whose weights are all 0 is always 0: {', '.join(self.names)}")
        for reward in self.rewards:
            if not callable(reward):
                raise InputError(f"reward {reward!r}: each part of a sum must be a function of (problem, text)")

    @staticmethod
    def of(*terms: tuple[Reward, float]) -> "WeightedSum":
        """Return the sum of rewards, each with its weight.

        Example:
            >>> from drpo.rewards import Format, exact_number
            >>> WeightedSum.of((exact_number, 1.0), (Format(), 0.2)).names
            ('exact_number', 'format')
        """
        return WeightedSum(tuple(Summand((reward,), weight) for reward, weight in terms))

    @property
    def rewards(self) -> list[Reward]:
        """The rewards, each once."""
        distinct: list[Reward] = []
        for reward in (r for term in self.terms for r in term.factors):
            if reward not in distinct:
                distinct.append(reward)
        return distinct

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each term's part; of equal names the second has a number: `format_2`."""
        names: list[str] = []
        for term in self.terms:
            name = "*".join(map(part_name, term.factors))
            names.append(next(n for i in count(1) if (n := f"{name}_{i}" if i > 1 else name) not in names))
        return tuple(names)

    def __call__(self, problem: Problem, transcript: Transcript) -> RewardResult | None:
        """Score an episode here and now, with rewards that are not async; a `RewardPool` runs each where it belongs.

        Args:
            problem: the question.
            transcript: of which each reward receives what it reads.

        Returns:
            The sum, the terms before their weights as its parts, and the weights; None if a reward abstained.

        Raises:
            ScoreError: a reward failed; the text names it.
        """
        rewards = [(r, transcript if reads_transcript(r) else transcript.text) for r in self.rewards]
        scored = self.combined([call(reward, problem, answer) for reward, answer in rewards])
        if scored.failure is not None:
            raise ScoreError(scored.failure.kind, scored.failure.text)
        return scored.result

    def combined(self, scores: Sequence[Scored]) -> Scored:
        """Return the sum of what the rewards gave an episode; the first failure is the whole's, and names its reward.

        Args:
            scores: of `rewards`, in order.
        """
        rewards, results = self.rewards, [scored.result for scored in scores]
        failures = [(r, m.failure) for r, m in zip(rewards, scores, strict=True) if m.failure is not None]
        failure = next((Failure(f.kind, f"{part_name(r)}: {f.text}") for r, f in failures), None)
        known = [result for result in results if result is not None]
        result: RewardResult | None = None
        if len(known) == len(rewards):
            result = self._added([_product([known[rewards.index(r)] for r in term.factors]) for term in self.terms])
            wrong = [x for x in (result.whole, *result.parts.values()) if not is_reward(x)]
            if wrong:
                result, failure = None, Failure("not_finite", f"the sum or a product is {not_a_reward(wrong[0])}")
        return Scored(result, failure, sum(m.seconds for m in scores), total(m.usage for m in scores))

    def _added(self, results: Sequence[RewardResult]) -> RewardResult:
        """The weighted sum of the terms' results."""
        weights = [term.weight for term in self.terms]
        parts = {name: result.whole for name, result in zip(self.names, results, strict=True)}
        for name, result in zip(self.names, results, strict=True):
            parts |= {f"{name}/{inner}": value for inner, value in result.parts.items()}
        of_turns = [
            [_times(turn, weight) for turn in result.turns]
            for result, weight in zip(results, weights, strict=True)
            if result.turns
        ]
        return RewardResult(
            sum(weight * result.total for weight, result in zip(weights, results, strict=True)),
            parts,
            tuple(reduce(_plus, turn) for turn in zip(*of_turns, strict=True)),
            weights=dict(zip(self.names, weights, strict=True)),
        )


def of_summands(terms: Sequence[Summand[Reward]]) -> WeightedSum:
    """Return the sum of these terms."""
    return WeightedSum(tuple(terms))


def summands(reward: Any) -> Sequence[Summand[Reward]] | None:
    """Return the terms of a sum; None for any other reward."""
    return reward.terms if isinstance(reward, WeightedSum) else None


def part_name(reward: object) -> str:
    """Return the name of a reward's part: that of its function, or of its class in small letters.

    Example:
        >>> from drpo.rewards import ExactMatch, exact_number
        >>> part_name(exact_number), part_name(ExactMatch())
        ('exact_number', 'exact_match')
    """
    name = str(getattr(reward, "__name__", None) or type(reward).__name__)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", re.sub(r"\W", "", name)).lower()


def _product(results: Sequence[RewardResult]) -> RewardResult:
    """The product of the whole rewards of an episode, which counts at its end; a single one as it is."""
    return results[0] if len(results) == 1 else RewardResult(prod(result.whole for result in results))


def _times(turn: Turn, weight: float) -> Turn:
    return tuple(weight * reward for reward in turn) if isinstance(turn, tuple) else weight * turn


def _plus(one: Turn, other: Turn) -> Turn:
    """The sum of two rewards of a turn; a single number is added to the other's last token."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return tuple(a + b for a, b in zip(one, other, strict=True))
    if isinstance(one, tuple):
        assert not isinstance(other, tuple)
        return (*one[:-1], one[-1] + other)
    return _plus(other, one) if isinstance(other, tuple) else one + other
