"""Mistakes about what may be claimed: in the tests, the family, the looks, collapse, and what was named in advance."""

from typing import Any

from planted import Replacement

CLAIMS = "tests/test_claims.py::"


def _halved(right: Any) -> Any:
    def t_test(parts: Any, shift: float = 0.0, alternative: str = "two-sided") -> Any:
        return right(parts, shift, alternative) / (2 if alternative == "two-sided" else 1)

    return t_test


def _last_step(right: Any) -> Any:
    """Every p-value times its own rank, in place of m - rank + 1."""

    def holm(p: Any) -> Any:
        import numpy as np

        ranks = np.argsort(np.argsort(p, axis=-1), axis=-1) + 1
        return np.minimum(p * ranks, 1.0)

    return holm


def _every_run_by_itself(right: Any) -> Any:
    def blocks(differences: Any) -> Any:
        import numpy as np

        *outer, regimes, seeds = differences.shape
        apart = np.full((*outer, regimes, regimes * seeds), np.nan)
        for r in range(regimes):
            apart[..., r, r * seeds : (r + 1) * seeds] = differences[..., r, :]
        return right(apart)

    return blocks


def _one_side(right: Any) -> Any:
    return lambda parts, margin, test: test(parts, margin, "less")


def _fallen_count_too(right: Any) -> Any:
    def differences(plan: Any, pairs: Any, seeds: Any) -> Any:
        from dataclasses import replace

        return right(replace(plan, collapse_below=-1.0), pairs, seeds)

    return differences


def _below_the_peak(right: Any) -> Any:
    def collapsed(trial: Any, below: float | None = None) -> Any:
        return right(trial, below) or trial.rewards[-1] <= max(trial.rewards) / 2

    return collapsed


def _whole_rate(right: Any) -> Any:
    return lambda seeds, error_rate: tuple(error_rate for _ in right(seeds, error_rate))


def _named_too_late(right: Any) -> Any:
    def named_plan(folder: Any, path: Any, planned_runs: Any) -> Any:
        from drpo.lab.claims import plan_of, read_plan

        return plan_of(folder) if path is None else read_plan(path)

    return named_plan


def _worse_half(right: Any) -> Any:
    return lambda scores: right({rate: [-x for x in of] for rate, of in scores.items()})


REPLACEMENTS = (
    Replacement(
        "a two-sided p-value is that of one side",
        "drpo.lab.paired:t_test",
        _halved,
        (f"{CLAIMS}test_students_test_over_regimes_is_scipys_of_the_seeds_means",),
    ),
    Replacement(
        "Holm's smallest p-value is multiplied by 1, the next by 2",
        "drpo.lab.multiple:holm",
        _last_step,
        (f"{CLAIMS}test_holm_is_closed_testing_with_bonferroni",),
    ),
    Replacement(
        "a seed's runs in several regimes change sign by themselves",
        "drpo.lab.paired:blocks",
        _every_run_by_itself,
        (f"{CLAIMS}test_a_regime_that_repeats_another_is_no_more_evidence",),
    ),
    Replacement(
        "equivalence is tested on one side",
        "drpo.lab.paired:equivalence",
        _one_side,
        (f"{CLAIMS}test_equivalence_takes_both_sides",),
    ),
    Replacement(
        "a collapse counts in the rate and in the ends",
        "drpo.lab.claims:differences",
        _fallen_count_too,
        (f"{CLAIMS}test_a_run_that_collapsed_counts_once",),
    ),
    Replacement(
        "a run collapses by falling from its own peak",
        "drpo.lab.analysis:has_collapsed",
        _below_the_peak,
        (f"{CLAIMS}test_collapse_does_not_depend_on_the_objective",),
    ),
    Replacement(
        "every look spends the whole error rate",
        "drpo.lab.multiple:look_levels",
        _whole_rate,
        (f"{CLAIMS}test_looks_spend_the_error_rate_and_no_more",),
    ),
    Replacement(
        "claims may be named when results are known",
        "drpo.cli.compare:named_plan",
        _named_too_late,
        (f"{CLAIMS}test_claims_are_named_before_the_first_trial",),
    ),
    Replacement(
        "the noise of rounding is a difference",
        "drpo.lab.claims:_apart",
        lambda right: lambda a, b: a - b,
        (f"{CLAIMS}test_what_says_nothing_decides_nothing",),
    ),
    Replacement(
        "the worse half of the learning rates is kept",
        "drpo.lab.halving:better_half",
        _worse_half,
        (f"{CLAIMS}test_rates_are_halved_by_the_rounds_own_seeds",),
    ),
)
