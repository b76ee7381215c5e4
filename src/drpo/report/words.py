"""Numbers of a run in words, the same in the report and on the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from drpo.errors import counted


def mean_score(mean: float, low: float | None, high: float | None) -> tuple[str, str]:
    """Return a held-out mean and its 95 % interval in words; of scores that leave [0, 1] the plain mean alone.

    Args:
        mean: of the scores.
        low, high: of the interval; nan or None where there is none.

    Example:
        >>> mean_score(0.5, 0.404, 0.596)
        ('50.0%', '95 % interval 40.4% to 59.6%')
        >>> mean_score(-0.0081, None, None)
        ('-0.0081', '')
    """
    if low is None or high is None or math.isnan(low):
        return f"{mean:.4g}", ""
    return f"{mean:.1%}", f"95 % interval {low:.1%} to {high:.1%}"


def measure(mean: float, pass_at_1: float, bounded: bool) -> str:
    """Return what a held-out mean is called: "accuracy" where every reward is 0 or 1, else "mean reward".

    Args:
        mean: of the rewards.
        pass_at_1: pass@1, the share of rewards of at least 1.
        bounded: whether every reward is in [0, 1]; then the mean is pass@1 only where each is 0 or 1.

    Example:
        >>> measure(0.5, 0.5, True), measure(0.5, 0.25, True), measure(0.5, 0.5, False)
        ('accuracy', 'mean reward', 'mean reward')
    """
    return "accuracy" if bounded and math.isclose(mean, pass_at_1, abs_tol=1e-6) else "mean reward"


def paired_change(difference: float, low: float | None, high: float | None, shares: bool) -> tuple[str, str]:
    """Return a held-out mean's paired difference from another, and its 95 % interval, in words.

    Args:
        difference: of the means over the same problems.
        low, high: of its interval; None where there is none.
        shares: whether the scores lie in [0, 1].

    Example:
        >>> paired_change(0.125, 0.05, 0.2, shares=True)
        ('+12.5 points', 'paired, 95 % interval +5.0 to +20.0 points')
        >>> paired_change(-0.25, None, None, shares=False)
        ('-0.25', '')
    """

    def signed(value: float) -> str:
        return f"{100 * value:+.1f}" if shares else f"{value:+.4g}"

    unit = " points" if shares else ""
    interval = "" if low is None or high is None else f"paired, 95 % interval {signed(low)} to {signed(high)}{unit}"
    return f"{signed(difference)}{unit}", interval


def where_it_held(warning: Mapping[str, Any]) -> str:
    """Return at which steps a warning held, in words.

    Args:
        warning: of a summary's `warnings`.

    Example:
        >>> where_it_held({"first_step": 4, "last_step": 9, "steps": 5, "ongoing": True})
        'since step 4, at 5 steps'
        >>> where_it_held({"first_step": 4, "last_step": 9, "steps": 6, "ongoing": False})
        'steps 4 to 9'
    """
    first, last, steps = warning["first_step"], warning["last_step"], warning["steps"]
    if first == last:
        return f"at step {first}"
    between = f"since step {first}" if warning["ongoing"] else f"steps {first} to {last}"
    return between if steps == last - first + 1 else f"{between}, at {steps} steps"


def warnings_in_words(warnings: Sequence[Mapping[str, Any]]) -> str:
    """Return the names of a run's warnings and where they held, in a line; empty without any.

    Args:
        warnings: of a summary.

    Example:
        >>> warnings_in_words([{"name": "truncation", "first_step": 4, "last_step": 9, "steps": 6, "ongoing": False}])
        'truncation (steps 4 to 9); drpo explain NAME says what to do'
    """
    named = ", ".join(f"{w['name']} ({where_it_held(w)})" for w in warnings)
    return f"{named}; drpo explain NAME says what to do" if named else ""


def warm_up_in_words(warm_up: Mapping[str, Any]) -> tuple[str, str]:
    """Return what came of a run's warm-up, in words.

    Args:
        warm_up: of a summary.

    Example:
        >>> warm_up_in_words({"problems": 200, "answered": 200, "solved": 36, "learnt": 1, "finished": True,
        ...                   "nll_first": 0.5, "nll_last": 0.25})
        ('36 of 200 problems', 'with a right answer; 1 answer learnt from, loss 0.500 to 0.250')
    """
    done = "" if warm_up["finished"] else f", {warm_up['answered']:,} of {warm_up['problems']:,} answered so far"
    first, last = warm_up["nll_first"], warm_up["nll_last"]
    loss = "" if first is None else f", loss {first:.3f} to {last:.3f}"
    learnt = f"{counted(warm_up['learnt'], 'answer')} learnt from"
    return (
        f"{warm_up['solved']:,} of {counted(warm_up['problems'], 'problem')}",
        f"with a right answer; {learnt}{loss}{done}",
    )


def evaluations_in_order(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return when a run was evaluated before and after what it did, in words, and each of these evaluations.

    Args:
        summary: of summary.json.

    Example:
        >>> [when for when, _ in evaluations_in_order({"evaluation_before": {"step": 0}, "evaluation_after": None})]
        ['before']
    """
    named = {"before": summary["evaluation_before"], "after": summary["evaluation_after"]}
    if "warm_up" in summary:
        before = summary["warm_up"]["evaluation_before"]
        named = {"before": before, "after the warm-up": named["before"], "after RL": named["after"]}
    return [(when, evaluation) for when, evaluation in named.items() if evaluation]


def no_gradient(counts: Mapping[str, Any]) -> tuple[str, str]:
    """Return how much of a run trained on nothing, in words.

    Args:
        counts: of a summary.

    Example:
        >>> no_gradient({"zero_grad_steps": 9, "steps": 12, "zero_grad_updates": 18, "updates": 24,
        ...              "frac_reward_zero_std": 0.75})
        ('9 of 12 steps', '18 of 24 updates; rewards equal in 75% of groups')
    """
    equal = counts["frac_reward_zero_std"]
    groups = "" if equal is None else f"; rewards equal in {equal:.0%} of groups"
    steps = f"{counts['zero_grad_steps']} of {counts['steps']} steps"
    return steps, f"{counts['zero_grad_updates']} of {counts['updates']} updates{groups}"
