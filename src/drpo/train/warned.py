"""Where the warnings of a run held, from its records alone: the same while it runs, after a resume, and afterwards."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from drpo.train.no_gradient import FIRST_WARNING, due
from drpo.train.run_warnings import BY_NAME, PAGE, RULES, SIGNAL_RULES
from drpo.train.warning_rules import COMPLETIONS, LENGTH, Past, Records, finite, idle, mean_length

READ = frozenset(name for rule in RULES for name in rule.reads) | {"step", COMPLETIONS}
"""Names of the figures that some rule looks at."""
_EVALUATED = ("step", "reward_mean", "low", "high", "difference_high")


@dataclass(frozen=True)
class RunWarning:
    """A warning of a run, and where it held.

    Args:
        name: of its rule.
        first_step: the first step at which it held; of steps in a row without a signal, the first of them.
        last_step: the last one.
        steps: number of steps at which it held, counted from the first in the same way.
        times: how often it began.
        streak: steps in a row, up to the last, after which it was found to hold.
        text: what was seen, and what to do, in a line, when it was last said.
    """

    name: str
    first_step: int
    last_step: int
    steps: int
    times: int
    streak: int
    text: str

    @property
    def page(self) -> str:
        """Its section of the documentation."""
        return f"{PAGE}#{self.name}"


Warnings = tuple[RunWarning, ...]


def after(warned: Warnings, past: Past) -> tuple[Warnings, Warnings]:
    """Return a run's warnings after one more step, and which of them are to be said now.

    One is said when it begins, and again when it has lasted twice as long. Where it comes and goes, it is said the
    first, the second, the fourth, the eighth time.

    Args:
        warned: of the steps before.
        past: with the step.
    """
    known = {w.name: w for w in warned}
    said = []
    for rule in RULES:
        if rule.holds(past):
            now = _once_more(known.get(rule.name), rule.name, past)
            if _is_due(now):
                now = replace(now, text=rule.line(past))
                said.append(now)
            known[rule.name] = now
    return tuple(known.values()), tuple(said)


def _once_more(before: RunWarning | None, name: str, past: Past) -> RunWarning:
    """A warning that holds after one more step; where that is the last of `FIRST_WARNING` idle ones, of all of them."""
    held = [int(r["step"]) for r in past.steps[-FIRST_WARNING if name in SIGNAL_RULES and idle(past) else -1 :]]
    if before is None:
        return RunWarning(name, held[0], held[-1], steps=len(held), times=1, streak=1, text="")
    goes_on = before.last_step == held[-1] - 1
    return replace(
        before,
        last_step=held[-1],
        steps=before.steps + sum(step > before.last_step for step in held),
        times=before.times + (not goes_on),
        streak=before.streak + 1 if goes_on else 1,
    )


def _is_due(warning: RunWarning) -> bool:
    """Whether one is to be said: of a streak the 1st step, the 4th, the 10th; of the times 1, 2, 4, 8, ..."""
    if warning.streak > 1:
        return due(warning.streak + FIRST_WARNING - 1)
    return warning.times & (warning.times - 1) == 0


class WarningLog:
    """The warnings of a run, as far as its records go.

    Attributes:
        warned: each that has held at some step, in the order in which they began.
    """

    def __init__(self, metrics: Records = (), evaluations: Records = ()) -> None:
        self.warned: Warnings = ()
        self._steps: list[Mapping[str, Any]] = []
        self._evaluations: list[Mapping[str, Any]] = []
        self._known: dict[str, tuple[int, int]] = {}  # steps and evaluations when a warning last held
        self.add(metrics, evaluations)

    def add(self, metrics: Records, evaluations: Records = ()) -> Warnings:
        """Take further records; return the warnings that are to be said of them.

        Args:
            metrics: of metrics.jsonl, the steps in their order.
            evaluations: of evaluations.jsonl; one is known to the rules from its own step on.
        """
        said: list[RunWarning] = []
        later = list(reversed(evaluations))
        for record in metrics:
            while later and later[-1]["step"] <= record["step"]:
                self._evaluations.append(_evaluated(later.pop()))
            self._steps.append(kept(record))
            self.warned, new = after(self.warned, Past(self._steps, self._evaluations))
            n = len(self._steps), len(self._evaluations)
            self._known |= {w.name: n for w in self.warned if w.last_step == record["step"]}
            said += new
        self._evaluations += map(_evaluated, reversed(later))
        return tuple(said)

    def summed_up(self) -> list[dict[str, Any]]:
        """Return the warnings as summary.json has them; the text of each is that of the last step at which it held."""
        step = self._steps[-1]["step"] if self._steps else 0
        return [
            {
                "name": w.name,
                "first_step": w.first_step,
                "last_step": w.last_step,
                "steps": w.steps,
                "times": w.times,
                "text": BY_NAME[w.name].line(self._past(w.name)),
                "page": w.page,
                "ongoing": w.last_step == step,
            }
            for w in self.warned
        ]

    def _past(self, name: str) -> Past:
        """The past of the last step at which a warning held."""
        steps, evaluations = self._known[name]
        return Past(self._steps[:steps], self._evaluations[:evaluations])


def kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the rules read of a step's metrics: finite numbers, the mean length, and at step 1 its first update.

    Example:
        >>> record = {"step": 1, "loss": 0.0, "k3": 0.2, "updates": [{"k3": 0.0, "loss": 0.0}, {"k3": 0.4}]}
        >>> kept(record) == {"step": 1, "k3": 0.2, "updates": [{"k3": 0.0}]}
        True
    """
    figures = finite(record, READ)
    if (length := mean_length(figures)) is not None:
        figures[LENGTH] = length
    updates = record.get("updates") if record["step"] == 1 else None
    return figures | ({"updates": [finite(updates[0], READ)]} if updates else {})


def _evaluated(record: Mapping[str, Any]) -> dict[str, Any]:
    return finite(record, _EVALUATED)


def raised(metrics: Records, evaluations: Records = ()) -> list[dict[str, Any]]:
    """Return the warnings of a run as summary.json has them, from its records alone.

    Args:
        metrics: of metrics.jsonl, all steps.
        evaluations: of evaluations.jsonl.
    """
    return WarningLog(metrics, evaluations).summed_up()
