"""Problems chosen by their measured pass rate: easy ones retire, hard ones wait, both come back now and then. No torch.

Two pure functions of frozen records: `choose` (state, seed, step) -> state with the problems of a rollout, and
`observe` (state, mean rewards of a rollout's groups) -> state. The same records follow from rollouts.jsonl.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import fmean
from typing import Any

from drpo.errors import InputError
from drpo.seeds import derive
from drpo.spec import Registry

GROUPS, COMPLETIONS = 2, 8
"""A pass rate is of the last two groups, or of as many as have 8 completions together; with fewer there is none yet."""
_ROUNDING = 1e-6
_KEPT = 8
"""Groups of a problem that are remembered: those of one completion each need so many."""


@dataclass(frozen=True)
class Pools:
    """Difficulty pools: a problem is easy, hard or active by its pass rate; rollouts are drawn from the active ones.

    The pass rate is the mean reward of a problem's last two groups, or of as many as have 8 completions. Problems not
    yet measured are active. Active ones are drawn without replacement, in a new order every epoch, as without pools.

    Args:
        easy: a problem whose pass rate is at least this retires, (hard, 1].
        hard: a problem whose pass rate is at most this waits, [0, easy).
        revisit: share of a rollout that is drawn from retired and waiting problems, those first that were not drawn for
            longest, [0, 1): how forgetting and progress are noticed.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> Pools().pool((1.0,), samples=8), Pools().pool((1.0, 0.5), samples=8), Pools().pool((0.0,), samples=4)
        ('easy', 'active', 'active')

    Source: the difficulty pools of prime-rl's task sampler. Kimi k1.5 (arXiv 2501.12599) samples by 1 - pass rate.
    """

    easy: float = 0.95
    hard: float = 0.05
    revisit: float = 0.1

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in ("easy", "hard", "revisit")}
        for name, value in values.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value <= 1) or (name == "revisit" and value == 1):
                bounds = "[0, 1)" if name == "revisit" else "[0, 1]"
                raise InputError(f"curriculum {name}={value!r}: must be a number in {bounds}")
        if self.hard >= self.easy:
            raise InputError(f"curriculum hard={self.hard}: must be below easy={self.easy}")

    def pool(self, means: Sequence[float], samples: int) -> str:
        """Return "easy", "hard" or "active", from the mean rewards of a problem's groups; see `pass_rate`."""
        rate = pass_rate(means, samples)
        if rate is None:
            return "active"
        return "easy" if rate >= self.easy else "hard" if rate <= self.hard else "active"


REGISTRY: Registry[Pools] = Registry("curriculum", {"pools": Pools})


@dataclass(frozen=True)
class Measured:
    """What is known of a problem that was drawn.

    Args:
        epoch: of its last draw.
        step: of its last draw: index of the rollout.
        means: mean reward of each of its last groups, the latest last.
    """

    epoch: int
    step: int
    means: tuple[float, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The problems of a rollout.

    Args:
        step: index of the rollout.
        problems: their ids.
        revisited: how many of them are easy or hard ones that came back.
        filled: how many of them are easy or hard ones because too few are active.
    """

    step: int
    problems: tuple[str, ...]
    revisited: int = 0
    filled: int = 0


@dataclass(frozen=True)
class State:
    """A curriculum's state between two rollouts.

    Args:
        begun: the first rollout that it chose.
        epoch: how often the active problems have all been drawn.
        problems: id -> what is known of it; of those that were drawn.
        ahead: chosen, and not yet observed; the earliest first.
    """

    begun: int = 0
    epoch: int = 0
    problems: Mapping[str, Measured] = field(default_factory=dict)
    ahead: tuple[Choice, ...] = ()

    def choice(self, step: int) -> Choice | None:
        """Return the choice of a rollout that is ahead, or None."""
        return next((choice for choice in self.ahead if choice.step == step), None)


def pass_rate(means: Sequence[float], samples: int) -> float | None:
    """Return the mean over a problem's last groups, or None where they have too few completions.

    Args:
        means: mean reward of each of its groups, the latest last.
        samples: completions of a group.

    Example:
        >>> pass_rate((0.0, 1.0, 0.5), samples=8), pass_rate((1.0,), samples=4)
        (0.75, None)
    """
    least = -(-COMPLETIONS // samples)
    return None if len(means) < least else fmean(means[-max(GROUPS, least) :])


def choose(rule: Pools, state: State, ids: Sequence[str], n: int, step: int, seed: int, samples: int) -> State:
    """Return the state in which the problems of a rollout are chosen; the last `Choice` of `ahead` has them.

    Each of the n is one that comes back with probability `rule.revisit`. The others are active ones not yet drawn in
    this epoch, then those of the next. Where that is not enough, more come back.

    Args:
        rule: the thresholds.
        state: of the results known so far.
        ids: of all problems, at least n.
        n: problems of the rollout.
        step: index of the rollout.
        seed: the run's seed.
        samples: completions of a group.

    Example:
        >>> first = choose(Pools(), State(), ["a", "b", "c"], n=2, step=0, seed=0, samples=8)
        >>> then = observe(first, 0, {name: [1.0] for name in first.ahead[0].problems})
        >>> choose(Pools(), then, ["a", "b", "c"], n=2, step=1, seed=0, samples=8).ahead[0].filled
        1
    """
    rng = random.Random(derive("curriculum", seed, step))
    known, epoch = state.problems, state.epoch
    order = [ids[i] for i in _order(len(ids), seed, epoch)]
    pools = {name: rule.pool(known[name].means if name in known else (), samples) for name in order}
    resting = sorted((name for name in order if pools[name] != "active"), key=lambda name: known[name].step)
    active = [name for name in order if pools[name] == "active"]
    revisited = resting[: sum(rng.random() < rule.revisit for _ in range(n))]
    wanted = n - len(revisited)
    drawn = [name for name in active if name not in known or known[name].epoch < epoch][:wanted]
    epochs = dict.fromkeys([*revisited, *drawn], epoch)
    if len(drawn) < min(wanted, len(active)):
        epoch += 1
        again = [ids[i] for i in _order(len(ids), seed, epoch) if pools[ids[i]] == "active" and ids[i] not in epochs]
        epochs |= dict.fromkeys(again[: wanted - len(drawn)], epoch)
    filled = resting[len(revisited) :][: n - len(epochs)]
    epochs |= dict.fromkeys(filled, epoch)
    chosen = list(epochs)
    rng.shuffle(chosen)  # updates divide a rollout in order
    means = {name: known[name].means if name in known else () for name in epochs}
    return replace(
        state,
        epoch=epoch,
        problems={**known, **{name: Measured(of, step, means[name]) for name, of in epochs.items()}},
        ahead=(*state.ahead, Choice(step, tuple(chosen), len(revisited), len(filled))),
    )


def observe(state: State, step: int, results: Mapping[str, Sequence[float]]) -> State:
    """Return the state with what a rollout has shown, which is then no longer ahead.

    Args:
        state: before.
        step: index of the rollout.
        results: id of a problem -> mean reward of each of its groups, those that were sampled again first.

    Raises:
        InputError: a mean reward is no pass rate.
    """
    require_rates(results)
    known = {name: state.problems[name] for name in results}
    after = {name: replace(was, means=(*was.means, *results[name])[-_KEPT:]) for name, was in known.items()}
    ahead = tuple(choice for choice in state.ahead if choice.step != step)
    return replace(state, problems={**state.problems, **after}, ahead=ahead)


def require_rates(rewards: Mapping[str, Sequence[float]]) -> None:
    """Refuse rewards whose mean is no pass rate.

    Args:
        rewards: id of a problem -> rewards of its completions, or means of them.

    Raises:
        InputError: one is not in [0, 1].
    """
    for name, values in rewards.items():
        wrong = next((value for value in values if not -_ROUNDING <= value <= 1 + _ROUNDING), None)
        if wrong is not None:
            raise InputError(
                f"curriculum: problem {name!r} has a reward of {wrong:g}; a pass rate is in [0, 1]: scale the reward, "
                "or leave --curriculum out"
            )


def shares(rule: Pools, state: State, n: int, samples: int) -> dict[str, float]:
    """Return which share of n problems is in each pool, and which was drawn at least once ("drawn")."""
    pools = [rule.pool(p.means, samples) for p in state.problems.values()]
    easy, hard = (pools.count(pool) for pool in ("easy", "hard"))
    return {"active": (n - easy - hard) / n, "easy": easy / n, "hard": hard / n, "drawn": len(pools) / n}


def measured_from(records: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, ...]]:
    """Return the mean rewards of each problem's last groups, as `State` has them, from records of rollouts.jsonl.

    Args:
        records: of the rollouts that a curriculum chose, in order.

    Example:
        >>> first, second = {"step": 1, "problem": "train-3"}, {"step": 5, "problem": "train-3", "earlier": [0.0]}
        >>> measured_from([first | {"reward": 1.0}, first | {"reward": 0.0}, second | {"reward": 1.0}])
        {'train-3': (0.5, 0.0, 1.0)}
    """
    groups: dict[tuple[int, str], list[float]] = {}
    earlier: dict[tuple[int, str], Sequence[float]] = {}
    for record in records:
        key = (record["step"], record["problem"])
        groups.setdefault(key, [])
        if record["reward"] is not None:
            groups[key].append(record["reward"])
        earlier[key] = record.get("earlier", ())
    means: dict[str, tuple[float, ...]] = {}
    for (step, name), rewards in groups.items():
        new = (*earlier[step, name], *([fmean(rewards)] if rewards else []))
        means[name] = (*means.get(name, ()), *new)[-_KEPT:]
    return means


@lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(derive("curriculum", seed, "epoch", epoch)).shuffle(order)
    return tuple(order)
