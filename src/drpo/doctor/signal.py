"""Will there be something to learn from? A group whose rewards are all equal gives no gradient."""

from collections.abc import Callable, Iterator, Sequence
from math import comb

from drpo.credit.advantages import Advantage
from drpo.doctor.finding import Finding, judge
from drpo.types import ScoredGroup

FEWEST = 0.1
"""Share of groups below which a run spends most of its time on nothing."""
_HEALTHY = 0.25
_CHANCE = 0.01
_MOSTLY = 0.5
FIRST, MOST = 8, 32
"""Groups that are looked at to begin with, and where these show little, in all."""


def carries_signal(group: ScoredGroup, advantage: Advantage) -> bool:
    """Whether any completion of a group has an advantage other than 0.

    Args:
        group: scored.
        advantage: rewards of a group -> advantages.
    """
    return len(group.rewards) >= 2 and bool((advantage(group.rewards) != 0).any())


def too_few(carrying: int, groups: int) -> bool:
    """Whether a share is below a tenth, and would be so small for a sound task in less than one case in a hundred.

    A sound task is one of which a quarter of the groups carry a signal: with 8 groups nothing can be said of it, of 32
    it takes 2 or fewer.

    Args:
        carrying: groups with a signal.
        groups: in all.

    Example:
        >>> too_few(0, 8), too_few(0, 32), too_few(2, 32), too_few(3, 32)
        (False, True, True, False)
    """
    chance = sum(comb(groups, i) * _HEALTHY**i * (1 - _HEALTHY) ** (groups - i) for i in range(carrying + 1))
    return carrying < FEWEST * groups and chance < _CHANCE


def sampled(draw: Callable[[int], Sequence[ScoredGroup]], advantage: Advantage) -> Iterator[ScoredGroup]:
    """Yield groups, a few at a time: as soon as a tenth of them carry a signal, no more; at most `MOST`.

    Args:
        draw: receives a number, from 0, and returns that many-th `FIRST` groups.
        advantage: as of `carries_signal`.
    """
    carrying = 0
    for part in range(MOST // FIRST):
        groups = draw(part)
        yield from groups
        carrying += sum(carries_signal(g, advantage) for g in groups)
        if carrying >= FEWEST * FIRST * (part + 1):
            return


def signal(groups: Sequence[ScoredGroup], advantage: Advantage) -> Finding:
    """Say what share of groups, sampled as in training, will have a gradient.

    Args:
        groups: scored; of the run's own problems, samples and length.
        advantage: as of `carries_signal`.
    """
    n, carrying = len(groups), sum(carries_signal(g, advantage) for g in groups)
    wrong = sum(bool(len(g.rewards)) and bool((g.rewards <= 0).all()) for g in groups)
    right = sum(bool(len(g.rewards)) and bool((g.rewards >= 1).all()) for g in groups)
    episodes = [e for g in groups for e in g.all_episodes]
    cut = sum(e.finish_reason == "length" for e in episodes) / max(1, len(episodes))
    unscored = sum(len(g.unscored) for g in groups) / max(1, len(episodes))
    verdict, advice = judge(not too_few(carrying, n), _advice(wrong / n, right / n, cut, unscored), otherwise="note")
    return Finding(
        "signal",
        verdict,
        f"{carrying} of {n} groups carry one; {wrong} all wrong, {right} all correct; {cut:.0%} of completions cut",
        f"{FEWEST:.0%} of groups",
        advice,
        {
            "share": carrying / max(1, n),
            "groups": n,
            "groups_all_wrong": wrong,
            "groups_all_correct": right,
            "truncated": cut,
        },
    )


def _advice(wrong: float, right: float, cut: float, unscored: float) -> str:
    """What may help, from shares of groups and of completions."""
    if unscored >= _MOSTLY:
        return f"the reward failed or abstained on {unscored:.0%} of completions; look at --reward"
    more = ["--sampling.samples", "--sampling.temperature"]
    flags = [*more, "a harder --task"] if right >= _MOSTLY else [*more, "an easier --task"]
    if right < _MOSTLY and wrong < _MOSTLY:
        flags = [*more, "--reward"]
    longer = ["--sampling.max-new-tokens"] if right < _MOSTLY and cut >= _MOSTLY else []
    return f"most steps would train on nothing, since all rewards of a group are equal; try {', '.join(longer + flags)}"
