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


def _empty_regimes_count(right: Any) -> Any:
    def blocks(differences: Any) -> Any:
        from dataclasses import replace

        import numpy as np

        parts = right(differences)
        regimes = differences.shape[-2]
        there = (~np.isnan(differences)).any(-1).sum(-1)[..., None]
        return replace(parts, sums=parts.sums * there / regimes, weights=parts.weights * there / regimes)

    return blocks


def _everywhere(right: Any) -> Any:
    def of(comparison: Any, contrast: Any, n: int) -> Any:
        both = [trial for trial in comparison.trials if trial.objective in (contrast.of, contrast.against)]
        first = sorted({trial.seed for trial in both})[:n]
        return {trial.name for trial in both if trial.seed in first}

    return of


def _no_seed_left(right: Any) -> Any:
    def seeds_per_round(n_rates: int, n_seeds: int) -> Any:
        rounds = len(right(n_rates, n_seeds))
        return tuple(n_seeds >> (rounds - 1 - i) for i in range(rounds))

    return seeds_per_round


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
    Replacement(
        "a regime without a pair takes its share of the weight",
        "drpo.lab.paired:blocks",
        _empty_regimes_count,
        (f"{CLAIMS}test_a_missing_pair_takes_no_weight_and_every_regime_weighs_the_same",),
    ),
    Replacement(
        "seeds are added in decided regimes too",
        "drpo.lab.looks:_of",
        _everywhere,
        (f"{CLAIMS}test_seeds_are_due_in_the_regime_and_at_the_rate_that_is_undecided",),
    ),
    Replacement(
        "every plan is corrected by Holm's rule",
        "drpo.lab.multiple:decided",
        lambda right: lambda differ, equivalent, levels, correction="holm": right(differ, equivalent, levels),
        (f"{CLAIMS}test_the_plan_chooses_the_correction",),
    ),
    Replacement(
        "the power of equivalence is Student's whatever the test",
        "drpo.lab.power:equivalence_power",
        lambda right: lambda seeds, level, margin, test="t": right(seeds, level, margin),
        (f"{CLAIMS}test_few_seeds_decide_nothing_by_sign_flips_however_clear",),
    ),
    Replacement(
        "the first rounds of tuning have no seed",
        "drpo.lab.halving:seeds_per_round",
        _no_seed_left,
        (f"{CLAIMS}test_each_round_halves_the_rates_and_doubles_the_seeds",),
    ),
)
