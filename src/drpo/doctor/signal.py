"""Checks that groups have a signal: an advantage, as the run computes it, that is not 0."""

from collections.abc import Callable, Iterator, Sequence
from math import comb

import torch

from drpo.checks import all_equal
from drpo.credit import CreditRule
from drpo.doctor.finding import Finding, judge
from drpo.types import ScoredGroup

FEWEST = 0.1
"""The smallest acceptable share of groups with a signal."""
_HEALTHY = 0.25
_CHANCE = 0.01
_MOSTLY = 0.5
FIRST, MOST = 8, 32
"""Number of groups sampled at first, and at most."""


def carrying(groups: Sequence[ScoredGroup], credit: CreditRule | None) -> int:
    """Return how many groups have a trained completion whose advantage is not 0.

    A critic compares the completions of all prompts: its groups carry a signal unless all their rewards are equal, of
    which it learns to expect no other.

    Args:
        groups: scored groups; each `FIRST` of them are credited together, as those of a step.
        credit: the run's rule; None with a critic.
    """
    parts = [groups[i : i + FIRST] for i in range(0, len(groups), FIRST)]
    if credit is None:
        return sum(sum(bool(g.results) for g in part) for part in parts if not _all_alike(part))
    pushed = {c.sequence for part in parts for c in credit(part, None) if bool(c.advantage.any())}
    return sum(any(s in pushed for s in g.sequences) for g in groups)


def _all_alike(groups: Sequence[ScoredGroup]) -> bool:
    """Whether the rewards of all groups' completions are equal, those of turns too."""
    turns = {result.turns for group in groups for result in group.results}
    return len(turns) <= 1 and all_equal(torch.cat([group.rewards for group in groups]))


def too_few(n: int, groups: int) -> bool:
    """Whether a share is below a tenth, and significantly below that of a sound task (p < 0.01).

    In a sound task a quarter of the groups carry a signal. 8 groups are too few to decide; of 32, 2 or fewer are
    significant.

    Args:
        n: number of groups with a signal.
        groups: number of groups.

    Example:
        >>> too_few(0, 8), too_few(0, 32), too_few(2, 32), too_few(3, 32)
        (False, True, True, False)
    """
    chance = sum(comb(groups, i) * _HEALTHY**i * (1 - _HEALTHY) ** (groups - i) for i in range(n + 1))
    return n < FEWEST * groups and chance < _CHANCE


def sampled(draw: Callable[[int], Sequence[ScoredGroup]], credit: CreditRule | None) -> Iterator[ScoredGroup]:
    """Yield groups, a few at a time, until a tenth of them carry a signal; at most `MOST`.

    Args:
        draw: receives an index i, from 0, and returns the i-th `FIRST` groups.
        credit: as in `carrying`.
    """
    n = 0
    for part in range(MOST // FIRST):
        groups = draw(part)
        yield from groups
        n += carrying(groups, credit)
        if n >= FEWEST * FIRST * (part + 1):
            return


def signal(groups: Sequence[ScoredGroup], credit: CreditRule | None) -> Finding:
    """Report the share of groups, sampled as in training, that have a signal.

    Args:
        groups: scored, sampled with the run's problems, samples and length.
        credit: as in `carrying`.
    """
    more = "--prompts" if credit is None else "--sampling.samples"
    return signal_of(groups, carrying(groups, credit), more=more)


def signal_of(
    groups: Sequence[ScoredGroup], with_signal: int, ends_known: bool = True, more: str = "--sampling.samples"
) -> Finding:
    """Report the share of groups that have a signal, where it has been counted.

    Args:
        groups: scored.
        with_signal: how many of them carry a signal.
        ends_known: whether the finish reasons are known; else nothing is said of completions that are cut.
        more: the option by which more completions are compared.
    """
    n = len(groups)
    wrong = sum(bool(len(g.rewards)) and bool((g.rewards <= 0).all()) for g in groups)
    right = sum(bool(len(g.rewards)) and bool((g.rewards >= 1).all()) for g in groups)
    episodes = [e for g in groups for e in g.all_episodes]
    cut = sum(e.finish_reason == "length" for e in episodes) / max(1, len(episodes)) if ends_known else 0.0
    unscored = sum(len(g.unscored) for g in groups) / max(1, len(episodes))
    verdict, advice = judge(
        not too_few(with_signal, n), _advice(wrong / n, right / n, cut, unscored, more), otherwise="note"
    )
    return Finding(
        "signal",
        verdict,
        f"{with_signal} of {n} groups carry a signal; {wrong} all wrong, {right} all correct"
        + (f"; {cut:.0%} of completions cut" if ends_known else ""),
        f"{FEWEST:.0%} of groups",
        advice,
        {
            "share": with_signal / max(1, n),
            "groups": n,
            "groups_all_wrong": wrong,
            "groups_all_correct": right,
            **({"truncated": cut} if ends_known else {}),
        },
    )


def _advice(wrong: float, right: float, cut: float, unscored: float, compared: str) -> str:
    """Return advice, from shares of groups and of completions, and the option by which more are compared."""
    if unscored >= _MOSTLY:
        return f"the reward failed or abstained on {unscored:.0%} of completions; look at --reward"
    more = [compared, "--sampling.temperature"]
    flags = [*more, "a harder --task"] if right >= _MOSTLY else [*more, "--warm-up 'best_of(8)'", "an easier --task"]
    if right < _MOSTLY and wrong < _MOSTLY:
        flags = [*more, "--reward"]
    longer = ["--sampling.max-new-tokens"] if right < _MOSTLY and cut >= _MOSTLY else []
    return f"most steps would train on nothing, since nearly all advantages are 0; try {', '.join(longer + flags)}"
