"""What shows in a run's metrics when its training fails: pure functions of what it has recorded so far.

`run_warnings.RULES` names them, with their thresholds, the reasons for these, and advice.
"""

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from statistics import fmean, median
from typing import Any

from drpo.train.no_gradient import FIRST_WARNING, explained, lately, without_signal

Records = Sequence[Mapping[str, Any]]

WINDOW = 5
"""Steps over which a figure is averaged; the first ones are what the last ones are compared with."""
_LEAST = 3
"""So many steps of a window must have the figure."""
MEMORY, EVALUATIONS = 100, 20
"""The last steps, and the last evaluations, among which the best is looked for."""
STARVED = 0.9
CUT = 0.5
ENTROPY_LOST, ENTROPY_GROWN = 0.1, 1.5
RATIO_OFF, K3_OFF = 0.05, 0.1
OUTSIDE, OUTSIDE_GROWN = 0.1, 2.0
SPIKE, SPIKE_HISTORY, SPIKE_LEAST = 10.0, 20, 10
LENGTH_FACTOR = 2.0
SKIPPED, SKIPPED_STEPS = 3, 10
FAILED = 0.1
ENDPOINT_FAILED, ENDPOINT_LEAST = 0.05, 20
LENGTH = "length"
"""Name of the mean length of a step's completions, beside its metrics."""
COMPLETIONS = "completions"
"""Name of the number of a step's completions, which an autopsy counts, since a dump may have no tokens."""


# ---- figures of the past ----


@dataclass(frozen=True)
class Gain:
    """How the training reward has moved.

    Args:
        first: its mean over the first steps.
        best: the best mean of `WINDOW` steps, of the last `MEMORY` and of the first.
        last: its mean over the last steps.
        spread: mean standard deviation of the rewards of a step.
    """

    first: float
    best: float
    last: float
    spread: float

    @property
    def unpaid(self) -> bool:
        """Whether less than half of what the reward gained is left, or it gained nothing."""
        return self.last - self.first <= (self.best - self.first) / 2

    @property
    def lost(self) -> bool:
        """Whether more than half of the gain is lost, and so much that noise does not explain it."""
        drop = self.best - self.last
        return drop > (self.best - self.first) / 2 and drop > max(self.spread / 2, 1e-9)


@dataclass(frozen=True)
class Past:
    """What a run has recorded so far.

    Args:
        steps: `kept` of each line of metrics.jsonl; at least one, and the last is the present.
        evaluations: of each line of evaluations.jsonl, of these steps.
    """

    steps: Records
    evaluations: Records = ()

    @cached_property
    def gain(self) -> Gain | None:
        """How the training reward has moved; None where that is not yet known."""
        first, last = early(self, "reward_mean"), recent(self, "reward_mean")
        if first is None or last is None:
            return None
        remembered = self.steps[-MEMORY:]
        windows = (remembered[max(0, end - WINDOW) : end] for end in range(len(remembered), 0, -WINDOW))
        means = [m for m in (_mean(figures(window, "reward_mean")) for window in windows) if m is not None]
        spreads = figures(remembered[::WINDOW], "reward_std") or [0.0]
        return Gain(first, max(first, last, *means), last, fmean(spreads))


def figures(records: Records, name: str) -> list[float]:
    """Return a metric of some steps, of those that have it."""
    return [record[name] for record in records if name in record]


def finite(record: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the figures of these names that are finite numbers."""
    known = ((name, record.get(name)) for name in names)
    return {name: v for name, v in known if isinstance(v, int | float) and math.isfinite(v)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if len(values) >= _LEAST else None


def recent(past: Past, name: str) -> float | None:
    """Return a metric's mean over the last steps; None where too few have it."""
    return _mean(figures(past.steps[-WINDOW:], name))


def early(past: Past, name: str) -> float | None:
    """Return a metric's mean over the first steps; None where too few have it, or are not yet apart from the last."""
    return _mean(figures(past.steps[:WINDOW], name)) if len(past.steps) >= 2 * WINDOW else None


def mean_length(record: Mapping[str, Any]) -> float | None:
    """Return the mean tokens of a step's completions, those that ended and those that were cut."""
    ended, cut, share = (record.get(name, 0.0) for name in ("length_terminated", "length_truncated", "truncated"))
    return (1 - share) * ended + share * cut or None


# ---- no signal ----


def idle(past: Past) -> bool:
    """Whether the last steps had no signal."""
    last = past.steps[-FIRST_WARNING:]
    return len(last) == FIRST_WARNING and all(map(without_signal, last))


def starved(past: Past, name: str) -> bool:
    """Whether nearly all groups of the last steps were so, or most of them in steps without any signal."""
    if idle(past):
        return fmean(figures(past.steps[-FIRST_WARNING:], name) or [0.0]) >= CUT
    last = figures(past.steps[-WINDOW:], name)
    return len(last) == WINDOW and fmean(last) >= STARVED


def says_starved(past: Past) -> str:
    """Return the line of `no_gradient`, which names causes and remedies."""
    if idle(past):
        return str(lately(past.steps))
    last = past.steps[-WINDOW:]
    taught = fmean(figures(last, "groups_with_signal") or [0.0]) > 1 - STARVED
    fault = "has equal rewards" if taught else "teaches nothing"
    return f"nearly every group of the last {WINDOW} steps {fault}: {explained(last)}"


def no_other_cause(past: Past) -> bool:
    """Whether the last steps had no signal, though groups were neither all wrong nor all correct."""
    return idle(past) and not any(starved(past, f"groups_all_{kind}") for kind in ("wrong", "correct"))


# ---- what each rule asks ----


def cut(past: Past) -> bool:
    """Whether most completions are cut, and no fewer than before."""
    now, before = recent(past, "truncated"), _mean(figures(past.steps[-2 * WINDOW : -WINDOW], "truncated"))
    return now is not None and before is not None and now >= CUT and now >= before - 0.01


def unpaid_entropy(past: Past) -> float | None:
    """The entropy of the last steps as a multiple of that of the first; None where the reward has paid for it."""
    now, start, rewards = recent(past, "entropy"), early(past, "entropy"), past.gain
    if now is None or not start or rewards is None or not rewards.unpaid:
        return None
    return now / start


def entropy_lost(past: Past) -> bool:
    """Whether the entropy has gone, and no reward has come of it."""
    share = unpaid_entropy(past)
    return share is not None and share <= ENTROPY_LOST


def entropy_grown(past: Past) -> bool:
    """Whether the entropy has grown, and no reward has come of it."""
    share = unpaid_entropy(past)
    return share is not None and share >= ENTROPY_GROWN


def _first_update(past: Past) -> Mapping[str, Any]:
    """The first update of the first step, where the policy is the sampler."""
    step = past.steps[0]
    updates = step.get("updates") or [step]
    return updates[0] if len(past.steps) == 1 and step.get("step") == 1 else {}


_MISMATCH = {"ratio_mean": "mean pi/mu", "k3": "k3"}


def mismatch(past: Past) -> bool:
    """Whether policy and sampler differ in the first update, before anything was learnt."""
    first = _first_update(past)
    return bool(abs(first.get("ratio_mean", 1.0) - 1) > RATIO_OFF or first.get("k3", 0.0) > K3_OFF)


def outside(past: Past) -> bool:
    """Whether many tokens are out of the region, and more than at first."""
    now = recent(past, "out_of_region")
    if now is None or now < OUTSIDE:
        return False
    start = early(past, "out_of_region")
    return start is not None and now >= OUTSIDE_GROWN * start


def _usual_norm(past: Past) -> float | None:
    norms = [n for n in figures(past.steps[-SPIKE_HISTORY - 1 : -1], "grad_norm") if n > 0]
    return median(norms) if len(norms) >= SPIKE_LEAST else None


def spike(past: Past) -> bool:
    """Whether the gradient of the present step is far larger than usual."""
    norm = figures(past.steps[-1:], "grad_norm")
    usual = _usual_norm(past) if norm and norm[0] > 0 else None
    return usual is not None and norm[0] > SPIKE * usual


def length_change(past: Past) -> float | None:
    """The length of the last steps as a multiple of that of the first; None where it is not known or rewards rose."""
    now, start = recent(past, LENGTH), early(past, LENGTH)
    if now is None or start is None or 1 / LENGTH_FACTOR < now / start < LENGTH_FACTOR:
        return None
    rewards = past.gain
    return now / start if rewards is not None and rewards.last <= rewards.first else None


def reward_lost(past: Past) -> bool:
    """Whether the training reward has fallen far below its best."""
    rewards = past.gain
    return rewards is not None and rewards.lost


def _reward_before(past: Past, step: int) -> float | None:
    """The mean training reward of the steps up to one; of the first steps for an evaluation before them."""
    at = bisect_right(past.steps, step, key=itemgetter("step"))
    window = past.steps[max(0, at - WINDOW) : at] if at else past.steps[:WINDOW]
    return _mean(figures(window, "reward_mean"))


def hacked(past: Past) -> Mapping[str, Any] | None:
    """The earlier evaluation that the last one is surely below, while the training reward is above; None if none."""
    known = [e for e in (*past.evaluations[:1], *past.evaluations[1:][-EVALUATIONS:]) if "reward_mean" in e]
    if len(known) < 2:
        return None
    last, best = known[-1], max(known[:-1], key=lambda e: float(e["reward_mean"]))
    if last.get("high", math.inf) >= best.get("low", -math.inf):
        if last.get("difference_high", 0.0) >= 0:
            return None
        best = known[0]
    before, now = _reward_before(past, best["step"]), _reward_before(past, last["step"])
    return best if before is not None and now is not None and now > before else None


def n_skipped(past: Past) -> int:
    """The updates of the last steps, a critic's too, that were skipped."""
    last = past.steps[-SKIPPED_STEPS:]
    return int(sum(sum(figures(last, name)) for name in ("skipped_updates", "value_skipped")))


def failed(past: Past) -> float:
    """The share of completions of the last steps whose reward failed."""
    last = [r for r in past.steps[-WINDOW:] if _completions(r)]
    failures = sum(figures(last, "reward_failed"))
    return failures / sum(map(_completions, last)) if len(last) == WINDOW else 0.0


def _completions(record: Mapping[str, Any]) -> float:
    """The number of a step's completions: as an autopsy counts them, else its tokens by their mean length."""
    counted: float = record.get(COMPLETIONS) or record.get("sampled_tokens", 0) / record.get(LENGTH, math.inf)
    return counted


def endpoint_failed(past: Past) -> float:
    """The share of calls of an endpoint in the last steps that gave no score; 0 where they were few."""
    last = past.steps[-WINDOW:]
    calls = sum(figures(last, "endpoint_calls"))
    return sum(figures(last, "endpoint_failed")) / calls if calls >= ENDPOINT_LEAST else 0.0


def exhausted(past: Past) -> bool:
    """Whether the present rollout had to take problems that teach little, as too few others are left."""
    return bool(past.steps[-1].get("curriculum_filled", 0) > 0)


# ---- what each rule says ----


def says_endpoint(past: Past) -> str:
    """Return the line of an endpoint that fails."""
    return f"{endpoint_failed(past):.0%} of the calls of the reward's endpoint in the last {WINDOW} steps gave no score"


def says_cut(past: Past) -> str:
    """Return the line of truncation."""
    return f"{recent(past, 'truncated'):.0%} of completions of the last {WINDOW} steps were cut at max_new_tokens"


def says_entropy(past: Past) -> str:
    """Return the line of the entropy."""
    moved = f"the entropy went from {early(past, 'entropy'):.3g} to {recent(past, 'entropy'):.3g} nats"
    rewards = past.gain
    assert rewards is not None
    return f"{moved}, and the training reward from {rewards.first:.3g} to {rewards.last:.3g}"


def says_mismatch(past: Past) -> str:
    """Return the line of the mismatch."""
    first = _first_update(past)
    figure = ", ".join(f"{what} {first[name]:.3g}" for name, what in _MISMATCH.items() if name in first)
    return f"before anything was learnt, {figure}: the sampler's log-probabilities are not the trainer's"


def says_outside(past: Past) -> str:
    """Return the line of the region."""
    return f"{recent(past, 'out_of_region'):.1%} of tokens left the region, {early(past, 'out_of_region'):.1%} at first"


def says_spike(past: Past) -> str:
    """Return the line of the gradient."""
    return f"the gradient's norm is {past.steps[-1]['grad_norm']:.3g}, usually {_usual_norm(past):.3g}"


def says_length(past: Past) -> str:
    """Return the line of the length."""
    moved = f"the mean length of completions went from {early(past, LENGTH):.1f} to {recent(past, LENGTH):.1f}"
    return f"{moved}, and the training reward did not rise"


def says_lost(past: Past) -> str:
    """Return the line of the training reward."""
    rewards = past.gain
    assert rewards is not None
    return f"the training reward fell from {rewards.best:.3g} to {rewards.last:.3g} (means of {WINDOW} steps)"


def says_hacked(past: Past) -> str:
    """Return the line of both rewards."""
    best, last = hacked(past), past.evaluations[-1]
    assert best is not None
    means = f"{best['reward_mean']:.3g} after step {best['step']} to {last['reward_mean']:.3g} after {last['step']}"
    return f"the held-out reward fell from {means}, while the training reward rose"


def says_skipped(past: Past) -> str:
    """Return the line of skipped updates."""
    return f"{n_skipped(past)} updates of the last {SKIPPED_STEPS} steps were skipped: their gradient was not finite"


def says_failed(past: Past) -> str:
    """Return the line of failed rewards."""
    return f"the reward failed on {failed(past):.0%} of completions of the last {WINDOW} steps"


def says_exhausted(past: Past) -> str:
    """Return the line of the curriculum."""
    last = past.steps[-1]
    shares = {pool: last.get(f"curriculum_{pool}", 0.0) for pool in ("active", "easy", "hard")}
    pools = ", ".join(f"{share:.0%} {pool}" for pool, share in shares.items())
    filled = f"{last['curriculum_filled']:.0f} problems of the rollout fill it up"
    return f"{filled}, as too few are left to learn from ({pools})"
