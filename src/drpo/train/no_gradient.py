"""Steps without a gradient or a signal: their number, likely causes from the metrics, and flags that may help."""

from collections.abc import Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]
ENOUGH = 5
"""A run of at least this many steps, none with a signal, is no success."""
FIRST_WARNING = 3
"""Steps in a row without a gradient before the first warning; the next ones follow when the number has doubled."""
_MOSTLY = 0.5
_OTHER_TERMS = (
    "the gradient is that of --entropy-bonus, --reference-kl, --kl-in-reward, a critic or the objective's own "
    "terms alone"
)
_WARM_START = "a warm start (--warm-up best_of, or drpo sft)"
_CONSTANT = "every completion of the run had the same reward, which prefers none to another"


def without_gradient(record: Mapping[str, Any]) -> bool:
    """Return whether no update of a step had a gradient; a skipped update had one, which was not finite.

    Args:
        record: of metrics.jsonl.
    """
    return record.get("grad_norm", 0.0) == 0 and not record.get("skipped_updates")


def without_signal(record: Mapping[str, Any]) -> bool:
    """Return whether a step learned nothing from its rewards: no gradient, or every advantage that they make is 0.

    Any gradient is then an additive term's (`--entropy-bonus`, `--reference-kl`) or that of `--kl-in-reward`.
    Records of earlier versions do not say what the advantages were: there equal rewards in each group are no signal,
    except to a critic.

    Args:
        record: of metrics.jsonl.

    Example:
        >>> equal = {"grad_norm": 0.1, "frac_reward_zero_std": 1.0}
        >>> without_signal(equal | {"groups_with_signal": 0.0}), without_signal(equal | {"groups_with_signal": 1.0})
        (True, False)
    """
    alike = record.get("frac_reward_zero_std") == 1 and "value_mean" not in record
    return without_gradient(record) or record.get("groups_with_signal", float(not alike)) == 0


def zero_grad_updates(record: Mapping[str, Any]) -> int:
    """Return how many of a step's updates had a gradient of exactly 0; from the norms, where it is not recorded."""
    norms = [update.get("grad_norm") for update in record.get("updates", [record])]
    return int(record.get("zero_grad_updates", sum(norm == 0 for norm in norms)))


def trailing(metrics: Records) -> Records:
    """Return the last steps in a row without a signal."""
    last = max((i for i, record in enumerate(metrics) if not without_signal(record)), default=-1)
    return metrics[last + 1 :]


def due(steps: int) -> bool:
    """Return whether to warn after so many steps in a row without a gradient: 3, 6, 12, 24, ...

    Example:
        >>> [n for n in range(50) if due(n)]
        [3, 6, 12, 24, 48]
    """
    rounds, left = divmod(steps, FIRST_WARNING)
    return left == 0 and rounds > 0 and rounds & (rounds - 1) == 0


def lately(metrics: Records) -> str | None:
    """Return a warning if at least the last 3 steps had no signal, else None.

    Args:
        metrics: of metrics.jsonl, the steps in their order.
    """
    steps = trailing(metrics)
    if len(steps) < FIRST_WARNING:
        return None
    if any(not without_gradient(record) for record in steps):
        return f"the last {len(steps)} steps learnt nothing from rewards: {_OTHER_TERMS}; {explained(steps)}"
    return f"the last {len(steps)} steps trained on nothing: no update had a gradient; {explained(steps)}"


def in_all(metrics: Records) -> str | None:
    """Return a final warning if half of a run's steps or more had no signal, else None.

    Args:
        metrics: of metrics.jsonl, all steps.
    """
    steps = _without_signal(metrics)
    if not steps or len(steps) < _MOSTLY * len(metrics):
        return None
    count, all_idle = f"{len(steps)} of {len(metrics)} steps", len(steps) == len(metrics)
    causes = explained(steps) if all_idle else f"in these steps: {explained(steps)}"  # shares of these steps' groups
    if any(not without_gradient(record) for record in steps):
        much = "nothing" if all_idle else "little"
        why = _OTHER_TERMS if all(map(without_signal, steps)) else _CONSTANT
        return f"{much} was learnt from rewards in {count}: {why}; {causes}"
    if all_idle:
        return f"nothing was learnt: no update of {len(metrics)} steps had a gradient; {causes}"
    return f"little was learnt: {count} had no gradient; {causes}"


def explained(steps: Records) -> str:
    """Return likely causes from the metrics of steps without a gradient, and flags that may help.

    Example:
        >>> explained([{"frac_reward_zero_std": 1.0, "groups_all_wrong": 1.0, "truncated": 0.9}])
        'all wrong in 100% of groups; 90% of completions cut at max_new_tokens; what may help: \
a warm start (--warm-up best_of, or drpo sft), an easier --task, --sampling.samples, --sampling.max-new-tokens'
    """
    equal, wrong, right, cut, silent, masked = (
        _mean(steps, name)
        for name in (
            "frac_reward_zero_std",
            "groups_all_wrong",
            "groups_all_correct",
            "truncated",
            "no_number",
            "masked",
        )
    )
    alike = equal - max(wrong, right) >= _MOSTLY
    failed, abstained = (sum(record.get(f"reward_{name}", 0) for record in steps) for name in ("failed", "abstained"))
    more, longer = "--sampling.samples", "--sampling.max-new-tokens"
    lines: list[tuple[bool, str, tuple[str, ...]]] = [
        (failed > 0, f"the reward failed on {failed} completions", ("--reward",)),
        (abstained > 0, f"the reward abstained on {abstained} completions", ("--reward",)),
        (wrong >= _MOSTLY, f"all wrong in {wrong:.0%} of groups", (_WARM_START, "an easier --task", more)),
        (right >= _MOSTLY, f"all correct in {right:.0%} of groups", ("a harder --task", more)),
        (alike, f"rewards equal in {equal:.0%} of groups", ("--sampling.temperature", more, "--reward")),
        (cut >= _MOSTLY and (wrong >= _MOSTLY or alike), f"{cut:.0%} of completions cut at max_new_tokens", (longer,)),
        (silent >= _MOSTLY and right < _MOSTLY, f"{silent:.0%} of completions hold no number", ("--reward",)),
        (masked >= _MOSTLY, f"the objective masks {masked:.0%} of tokens", ("--objective",)),
    ]
    causes = [cause for applies, cause, _ in lines if applies]
    remedies = dict.fromkeys(flag for applies, _, flags in lines if applies for flag in flags)
    helpful = f"; what may help: {', '.join(remedies)}" if remedies else ""
    return f"{'; '.join(causes) or 'no cause shows in the metrics'}{helpful}"


def counted(metrics: Records) -> dict[str, Any]:
    """Return counts for a summary: updates and steps without a gradient, steps without a signal, the equal rewards.

    Args:
        metrics: of metrics.jsonl, all steps.
    """
    return {
        "zero_grad_updates": sum(map(zero_grad_updates, metrics)),
        "zero_grad_steps": sum(map(without_gradient, metrics)),
        "no_signal_steps": len(_without_signal(metrics)),
        "frac_reward_zero_std": _mean(metrics, "frac_reward_zero_std") if metrics else None,
        "warning": in_all(metrics),
    }


def learnt_nothing(summary: Mapping[str, Any]) -> bool:
    """Return whether a finished run of 5 steps or more had no step with a signal.

    Args:
        summary: of summary.json.
    """
    return bool(summary["finished"]) and ENOUGH <= summary["steps"] == summary["no_signal_steps"]


def _without_signal(metrics: Records) -> Records:
    """Return the steps without a signal: all steps if every completion of the run had the same reward."""
    constant = len(metrics) >= FIRST_WARNING and all(
        record.get("reward_std") == 0 and record.get("frac_reward_zero_std", 1) == 1 for record in metrics
    )
    if constant and len({record["reward_mean"] for record in metrics}) == 1:
        return metrics
    return [record for record in metrics if without_signal(record)]


def _mean(steps: Records, name: str) -> float:
    """Return the mean over the steps that have it; 0 if none has."""
    values = [record[name] for record in steps if name in record]
    return sum(values) / len(values) if values else 0.0
