"""Mistakes in what is said: metrics, statistics, the figures of reports, records, and what several processes add up."""

from contextlib import nullcontext
from typing import Any

from planted import Replacement

METRICS = "tests/test_metrics.py::"
STATISTICS = "tests/test_statistics.py::"
REPORT = "tests/test_report.py::"
REPLAY = "tests/test_replay.py::"
TOKEN_ORACLE = f"{METRICS}test_token_figures_are_the_oracles"
EVERY = f"{STATISTICS}test_bounds_are_those_of_all_resamples"


def _mean_of_strata(right: Any) -> Any:
    def pooled(statistic: Any) -> Any:
        return lambda *parts, axis: sum(statistic(part, axis=axis) for part in parts) / len(parts)

    return pooled


def _or_equal(right: Any) -> Any:
    def improvement(*parts: Any, axis: int) -> Any:
        return right(*(p + 1e-9 * (i % 2 == 0) for i, p in enumerate(parts)), axis=axis)

    return improvement


def _together(right: Any) -> Any:
    return lambda strata, *rest, **options: right([[v for part in strata for v in part]], *rest, **options)


def _one_sequence(right: Any) -> Any:
    def tokens_of(rows: Any) -> Any:
        from dataclasses import replace

        tokens = right(rows)
        return replace(tokens, sequence=tokens.sequence * 0)

    return tokens_of


def _cut(right: Any) -> Any:
    def as_table(*arguments: Any, **options: Any) -> Any:
        table = right(*arguments, **options)
        for column in table.columns:
            column.overflow = "ellipsis"
        return table

    return as_table


def _ratio_for_weight(right: Any) -> Any:
    def weight(objective: Any, tokens: Any) -> Any:
        from drpo.objectives import ratio

        return ratio(tokens)

    return weight


def _mu_and_pi(right: Any) -> Any:
    def joined(run: Any, records: Any, spec: Any) -> Any:
        turned = [{**r, "logp": r["behavior_logp"], "behavior_logp": r["logp"]} for r in records]
        return right(run, turned, spec)

    return joined


REPLACEMENTS = (
    Replacement(
        "masked tokens count in the figures",
        "drpo.train.metrics:_kept",
        lambda right: lambda stats: stats,
        (f"{METRICS}test_tokens_that_are_not_kept_count_nowhere", TOKEN_ORACLE),
    ),
    Replacement(
        "the shift is that of ratios",
        "drpo.train.metrics:prob_diff",
        lambda right: lambda tokens, power=0.0: right(tokens, 1.0),
        (TOKEN_ORACLE,),
    ),
    Replacement(
        "pass@k draws with replacement",
        "drpo.train.evaluate:pass_at_k",
        lambda right: lambda n, n_right, k: 1 - (1 - n_right / n) ** k,
        (
            f"{METRICS}test_pass_at_k_is_the_share_of_subsets_with_a_right_one",
            f"{METRICS}test_one_right_of_four_passes_at_four",
        ),
    ),
    Replacement(
        "a failure is dropped where it should be scored 0",
        "drpo.train.score:_group",
        lambda right: lambda problem, pairs, zero: right(problem, pairs, False),
        ("tests/test_batch_policy.py::test_a_failure_may_score_zero_and_is_told_from_a_wrong_answer",),
    ),
    Replacement(
        "seeds of all strata are resampled together",
        "drpo.lab.statistics:stratified_interval",
        _together,
        (f"{STATISTICS}test_strata_are_resampled_within", EVERY),
    ),
    Replacement(
        "the statistic of strata is a mean of their statistics",
        "drpo.lab.statistics:_pooled",
        _mean_of_strata,
        (EVERY,),
    ),
    Replacement(
        "the interval depends on the order of the seeds",
        "drpo.lab.statistics:_finite",
        lambda right: lambda values: [float(value) for value in values],
        (f"{STATISTICS}test_order_does_not_matter",),
    ),
    Replacement(
        "equal values count as an improvement",
        "drpo.lab.statistics:_improvement",
        _or_equal,
        (f"{STATISTICS}test_probability_of_improvement_is_mann_whitneys",),
    ),
    Replacement(
        "all completions of an update count as one sequence",
        "drpo.report.token_statistics:tokens_of",
        _one_sequence,
        (f"{REPORT}test_the_weights_of_a_run_are_those_of_its_updates[objective0]",),
    ),
    Replacement(
        "the ratio is shown in place of the weight",
        "drpo.report.token_statistics:gradient_weight",
        _ratio_for_weight,
        (f"{REPORT}test_what_an_update_saw_by_hand",),
    ),
    Replacement(
        "a line is drawn across the steps that have no number",
        "drpo.report.panels:number",
        lambda right: lambda value: right(value) or 0.0,
        (f"{REPORT}test_every_curve_is_the_records_and_has_a_gap_where_these_have_no_number",),
    ),
    Replacement(
        "a report has no curves of the critic",
        "drpo.report.panels:PANELS",
        lambda right: tuple(panel for panel in right if not panel.title.startswith("Critic")),
        (f"{REPORT}test_a_critic_has_curves_of_its_own",),
    ),
    Replacement(
        "a drawn gradient weight is clamped and nothing says so",
        "drpo.report.weights:beyond_axis",
        lambda right: lambda objectives, mu, advantage: [],
        (
            "tests/test_cli.py::test_weights_draws_on_the_screen_alone_unless_it_is_told_a_file",
            "tests/test_cli.py::test_the_figure_says_which_weights_it_cuts_off",
        ),
    ),
    Replacement(
        "a table does not say how to read it",
        "drpo.report.comparison_data:READING",
        lambda right: "",
        ("tests/test_comparison_report.py::test_every_table_says_how_to_read_it",),
    ),
    Replacement(
        "the bytes of a random model are shown as a sample",
        "drpo.live.step_table:no_text",
        lambda right: lambda text: "",
        ("tests/test_watch.py::test_a_sample_of_bytes_is_said_in_words",),
    ),
    Replacement(
        "a number of a table is cut where the terminal is narrow",
        "drpo.terminal:as_table",
        _cut,
        (f"{REPLAY}test_no_number_of_a_table_is_cut",),
    ),
    Replacement(
        "mu and pi change places in a replay",
        "drpo.lab.replay:batch_of",
        _mu_and_pi,
        (f"{REPLAY}test_the_batch_is_what_was_recorded_less_what_was_not_trained",),
    ),
    Replacement(
        "gradients are not added up over the processes",
        "drpo.ranks:Ranks.all_reduce_gradients",
        lambda right: lambda self, parameters: None,
        ("tests/test_ranks.py::test_two_processes_are_one_run",),
    ),
    Replacement(
        "a damaged checkpoint is resumed from",
        "drpo.train.checkpoint:require_sound",
        lambda right: lambda checkpoint: None,
        (
            "tests/test_train.py::test_a_damaged_checkpoint_is_passed_over_and_that_is_said",
            "tests/test_train.py::test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before",
        ),
    ),
    Replacement(
        "the doctor's canary changes nothing",
        "drpo.doctor.sync:changed",
        lambda right: lambda policy: nullcontext(),
        ("tests/test_doctor.py::test_every_fault_is_found_and_named[stale weights]",),
    ),
)
