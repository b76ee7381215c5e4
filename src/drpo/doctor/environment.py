"""Checks of a run's environments: their answers depend on problem, seed and turns alone; the time of a step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from drpo.doctor.finding import Finding, judge
from drpo.rollout import Environments
from drpo.types import Failure, Problem
from drpo.types.environment import Observation, StepResult, Turn

Answers: TypeAlias = tuple[Observation | StepResult | Failure, ...]
"""Of one episode: the observation, then the answer to each turn."""

SLOW_S = 1.0
"""A step that takes longer is worth a note."""


@dataclass(frozen=True)
class Replay:
    """What environments answered.

    Args:
        answers: of each episode.
        seconds: of each step.
    """

    answers: tuple[Answers, ...]
    seconds: tuple[float, ...]


def replay(
    environments: Environments, problems: Sequence[Problem], turns: Callable[[int, Observation], Sequence[Turn]]
) -> Replay:
    """Play scripted episodes, each to its end or that of its script.

    Args:
        environments: entered, without open episodes.
        problems: one for each episode.
        turns: number of an episode, and what its environment says first -> the turns to play.
    """
    answers: list[list[Observation | StepResult | Failure]] = [[o] for o in environments.open(problems)]
    seconds = []
    for number, episode in enumerate(answers):
        first = episode[0]
        for turn in turns(number, first) if isinstance(first, Observation) else ():
            start = time.perf_counter()
            result = environments.step({number: turn})[number]
            seconds.append(time.perf_counter() - start)
            episode.append(result)
            if isinstance(result, Failure) or result.done:
                break
    environments.close()
    return Replay(tuple(map(tuple, answers)), tuple(seconds))


def scripted(observation: Observation) -> list[Turn]:
    """Return turns that any environment can answer: calls of its first tool, or numbers."""
    call = [f'<tool_call>{{"name": "{tool["function"]["name"]}"}}</tool_call>' for tool in observation.tools[:1]]
    return [Turn(text, (), "stop") for text in (*call, "1", "2", "3")]


def environment(first: Replay, again: Replay) -> Finding:
    """Whether the same problems, seeds and turns are answered alike by episodes that follow one another.

    Args:
        first: some episodes.
        again: the same, opened when those were closed.
    """
    pairs = list(zip(first.answers, again.answers, strict=True))
    starts = sum(a[0] != b[0] for a, b in pairs)
    replies = sum(a[1:] != b[1:] for a, b in pairs)
    failures = [f for answers in first.answers for f in answers if isinstance(f, Failure)]
    seconds = sorted(first.seconds + again.seconds)
    p95 = seconds[int(0.95 * (len(seconds) - 1))] if seconds else 0.0
    verdict, advice = judge(not (starts or replies), _advice(starts))
    if verdict == "ok" and failures:
        everywhere = len(failures) == len(first.answers)
        verdict, advice = ("broken" if everywhere else "note"), f"an environment failed: {failures[0].text}"
    elif verdict == "ok" and p95 > SLOW_S:
        verdict, advice = (
            "note",
            "a rollout waits for the slowest of its environments in each turn: make a step quicker",
        )
    return Finding(
        "environment",
        verdict,
        f"{starts} of {len(pairs)} episodes begin otherwise when opened again, {replies} answer the same turns "
        f"otherwise; {1000 * p95:.1f} ms a step (p95), {len(failures)} failed",
        "0, 0, 0 failed",
        advice,
        {"starts": starts, "replies": replies, "failed": len(failures), "p95_s": p95},
    )


def _advice(starts: int) -> str:
    what = "starts" if starts else "replies"
    return (
        f"its {what} depend on more than the problem, the seed and the turns: draw random numbers from the seed that "
        "`open` receives, and keep nothing from one episode to the next"
    )


def group(of_group: Replay, between: "SeedsRead | None" = None) -> Finding:
    """Whether all samples of a problem meet the same hidden state, and different problems their own.

    Args:
        of_group: episodes of which numbers 2i and 2i + 1 have the same problem and the same turns.
        between: what other seeds and other problems change; None where that was not tried.
    """
    pairs = list(pairwise(of_group.answers))[::2]
    apart = sum(a != b for a, b in pairs)
    advice = ""
    if apart:
        advice = "samples of one problem play different games: derive the hidden state from the seed `open` receives"
    elif between is not None and between.shared:
        advice = "all problems have the same hidden state, though it is drawn from a seed: derive it from the problem's"
    verdict, advice = judge(not advice, advice)
    read = "" if between is None else f"; the seed {'matters' if between.matters else 'changes nothing'}"
    return Finding(
        "group",
        verdict,
        f"{apart} of {len(pairs)} pairs of samples of a problem meet different hidden states{read}",
        "0",
        advice,
        {"apart": apart, "pairs": len(pairs)}
        | ({} if between is None else {"seed_matters": between.matters, "shared": between.shared}),
    )


@dataclass(frozen=True)
class SeedsRead:
    """What seeds change in an environment.

    Args:
        matters: the episodes of one seed of the run are not those of another.
        shared: and yet problems that differ in their ids alone have equal episodes.
    """

    matters: bool
    shared: bool

    @staticmethod
    def of(one: Replay, other: Replay) -> "SeedsRead":
        """Return what episodes of two seeds of the run say; they have equal turns, and problems of different ids.

        Args:
            one: of a seed.
            other: the same, of another.
        """
        matters = one.answers != other.answers
        return SeedsRead(matters, matters and all(answers == one.answers[0] for answers in one.answers))
