"""Mistakes in what is read of other frameworks' dumps, and in what is said of them."""

from dataclasses import replace
from typing import Any

from planted import Replacement

HERE = "tests/test_autopsy.py::"
NAMED = f"{HERE}test_planted_failures_are_named_from_each_format_that_can_show_them"
SOUND = f"{HERE}test_of_a_sound_run_nothing_is_said"
BY_HAND = f"{HERE}test_figures_by_hand"
OWN_RUN = f"{HERE}test_a_run_of_our_own_is_judged_as_its_own_metrics_are"


def _swapped(right: Any) -> Any:
    def step_tokens(rollouts: Any, pushed: Any) -> Any:
        return right([replace(r, logp=r.behavior_logp, behavior_logp=r.logp) for r in rollouts], pushed)

    return step_tokens


def _any_class(right: Any) -> Any:
    import pickle

    return pickle.Unpickler.find_class


def _all_sampled(right: Any) -> Any:
    def read_lines(path: Any, kind: Any) -> Any:
        for where, row in right(path, kind):
            if hasattr(row, "loss_mask"):
                row.loss_mask |= 1
            yield where, row

    return read_lines


def _as_zero(right: Any) -> Any:
    def figures(rollouts: Any, groups: Any) -> Any:
        return {"truncated": 0.0, "length_truncated": 0.0, "sampled_tokens": 0} | right(rollouts, groups)

    return figures


REPLACEMENTS = (
    Replacement(
        "in an autopsy mu and pi change places",
        "drpo.autopsy.steps:step_tokens",
        _swapped,
        (BY_HAND,),
    ),
    Replacement(
        "a pickle of a stranger is unpickled as it wants",
        "drpo.autopsy.skyrl:_Plain.find_class",
        _any_class,
        (f"{HERE}test_a_batch_runs_nothing",),
    ),
    Replacement(
        "what a dump does not have counts as 0",
        "drpo.autopsy.steps:_episode_figures",
        _as_zero,
        (f"{HERE}test_what_a_dump_lacks_is_absent_and_not_zero",),
    ),
    Replacement(
        "the tokens of the prompt count as sampled in a token export",
        "drpo.autopsy.prime_rl:read_lines",
        _all_sampled,
        (f"{HERE}test_dumps_of_the_frameworks_own_code_are_read",),
    ),
    Replacement(
        "held-out rollouts are taken for trained ones",
        "drpo.autopsy.skyrl:EVALUATION",
        lambda right: replace(right, read=lambda path: (replace(r, held_out=False) for r in right.read(path))),
        (f"{NAMED}[skyrl]", f"{SOUND}[skyrl]"),
    ),
    Replacement(
        "advantages of rounding errors are a signal",
        "drpo.autopsy.steps:ROUNDING",
        lambda right: 0.0,
        (f"{HERE}test_rounding_errors_are_no_signal_and_a_critics_advantages_are",),
    ),
    Replacement(
        "broken log-probabilities of a dump are trained on",
        "drpo.autopsy.steps:slack",
        lambda right: lambda dtype: 10.0,
        (f"{HERE}test_broken_log_probabilities_are_left_out_and_said",),
    ),
    Replacement(
        "the files of a dump are read as their names sort",
        "drpo.autopsy.formats:_by_number",
        lambda right: lambda path: path.as_posix(),
        (f"{HERE}test_files_are_read_in_the_order_of_their_numbers_and_others_are_left_out",),
    ),
    Replacement(
        "a line of any length is parsed",
        "drpo.autopsy.lines:read_lines",
        lambda right: _without_limit(right),
        (f"{HERE}test_a_line_that_is_too_long_is_refused_before_it_is_parsed",),
    ),
)


def _without_limit(right: Any) -> Any:
    def read_lines(path: Any, kind: Any) -> Any:
        from drpo.autopsy import lines

        lines.LONGEST = 2**40
        return right(path, kind)

    return read_lines
