"""Mistakes in the studies: in the exact problems, and in the task of the stability benchmark."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from planted import Replacement

THEORY = "tests/test_theory.py::"


def forgets_the_softmax(estimate: Callable[..., Any]) -> Callable[..., Any]:
    from exact.bandit import slopes

    def wrong(objective: Any, problem: Any, logits: Any) -> Any:
        expected = (problem.distribution * slopes(objective, problem, logits.log_softmax(-1))).sum(0)
        return replace(estimate(objective, problem, logits), mean=expected)

    return wrong


def swaps_the_divergences(distance: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(problem: Any, logits: Any) -> Any:
        found = distance(problem, logits)
        return replace(found, kl=found.reverse_kl, reverse_kl=found.kl)

    return wrong


def draws_the_other_outcome(frozen: Callable[..., Any]) -> Callable[..., Any]:
    return lambda problem, generator: frozen(replace(problem, chance=problem.chance.flip(0)), generator)


def counts_all_places(class_share: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(problem: Any, text: str) -> float:
        letter, cue = problem.data["letter"], problem.data["cue"]
        return sum(w[0] == letter and int(w[1:]) % 8 == cue for w in text.split()) / 4

    return wrong


REPLACEMENTS = (
    Replacement(
        "the softmax's own derivative is forgotten in the expected gradient",
        "exact.bandit:estimate",
        forgets_the_softmax,
        (
            f"{THEORY}test_mean_and_covariance_are_the_sums_over_all_draws",
            f"{THEORY}test_the_plain_surrogate_is_unbiased_anywhere_and_the_true_gradient_is_the_values",
        ),
    ),
    Replacement(
        "KL and reverse KL change places",
        "exact.bandit:distance",
        swaps_the_divergences,
        (f"{THEORY}test_distances_are_their_definitions",),
    ),
    Replacement(
        "a token is moved up its loss",
        "exact.claims:gradient",
        lambda gradient: lambda objective, tokens: -gradient(objective, tokens),
        (f"{THEORY}test_the_fixed_point_of_a_token_is_its_formula_from_both_sides",),
    ),
    Replacement(
        "outcomes are drawn the other way round",
        "exact.long_tail:frozen",
        draws_the_other_outcome,
        (f"{THEORY}test_frozen_outcomes_come_as_often_as_their_chance",),
    ),
    Replacement(
        "words count wherever they stand",
        "tail_language:class_share",
        counts_all_places,
        ("tests/test_stability.py::test_words_count_at_their_places_alone",),
    ),
)
