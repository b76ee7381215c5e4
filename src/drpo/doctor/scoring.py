"""Checks that the reward scores right answers 1 and all others less, and measures its time."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from drpo.doctor.finding import Finding, judge
from drpo.doctor.mutation import mutate, mutated
from drpo.rewards import Reward, RewardConfig, RewardPool, Scored
from drpo.rewards.contract import is_graded
from drpo.rewards.weighted import WeightedSum
from drpo.types import Problem, RewardResult

PHRASES = ("{}", "The answer is {}.", "The answer is \\boxed{{{}}}.", "<answer>{}</answer>", "#### {}")
"""Phrasings of an answer; the reward must accept at least one."""

NO_ANSWER = ("", " ", "I do not know.", "\\boxed{", "??? !!!")

RIGHT = 1.0


def reward(scorer: Reward, problems: Sequence[Problem], config: RewardConfig | None = None) -> tuple[Finding, Finding]:
    """Score the reference answers, answers to other problems, texts without an answer, and mutated reference answers.

    Of a weighted sum one part has to tell right answers from others.

    Args:
        scorer: the reward.
        problems: problems, some with reference answers.
        config: processes and limits; None is `RewardConfig()`.

    Returns:
        The finding on the first three, and the finding on the mutated answers.
    """
    mutations = mutate(problems)
    empty = [(p, text) for p in problems[:4] for text in NO_ANSWER]
    with RewardPool(scorer, config) as pool:
        tried = [(form, pool.score([(p, form.format(p.answer)) for p in problems if p.answer])) for form in PHRASES]
        form, gold = max(tried, key=lambda scored: _mean(scored[1]))
        wrong = pool.score(
            [(a, form.format(b.answer)) for a, b in pairwise(problems) if a.answer and b.answer != a.answer]
        )
        none = pool.score(empty)
        mutants = pool.score([(m.problem, form.format(m.answer)) for m in mutations])
    scores = [*gold, *wrong, *none]
    faults = {}
    for name, graded in _parts(scorer).items():
        of_part = _of(name, gold), _of(name, wrong), _of(name, none)
        faults[name] = _misgraded(*of_part) if graded else _fault(problems, *of_part, empty)
    part = min(faults, key=lambda name: bool(faults[name]))  # of a sum the part that knows right answers, if one does
    gold, wrong, none = _of(part, gold), _of(part, wrong), _of(part, none)
    fooled = mutated(mutations, _of(part, mutants))
    verdict, advice = judge(not faults[part], faults[part])
    seconds = sorted(m.seconds for m in scores)
    failures = [m.failure for m in scores if m.failure is not None]
    late = sum(failure.kind == "timed_out" for failure in failures)
    values = {
        "gold": _mean(gold),
        "wrong": _mean(wrong),
        "no_answer": _mean(none),
        "p50_s": statistics.median(seconds),
        "p95_s": seconds[int(0.95 * (len(seconds) - 1))],
        "timed_out": late,
        "failed": len(failures) - late,
    }
    answers = (
        f"reference answers {values['gold']:.2f}, others' {values['wrong']:.2f}" if gold else "no reference answers"
    )
    finding = Finding(
        "reward",
        verdict,
        f"{part and f'{part}: '}{answers}, none {values['no_answer']:.2f}; {1000 * values['p50_s']:.1f} ms p50, "
        f"{1000 * values['p95_s']:.1f} ms p95, {late} of {len(scores)} timed out, {len(failures) - late} failed",
        "reference answers above the others" if _parts(scorer)[part] else "1, 0, 0",
        advice,
        values,
    )
    return finding, fooled


def _parts(scorer: Reward) -> dict[str, bool]:
    """The parts of a sum that have a positive weight, and whether each is graded; "" is the whole of another reward."""
    terms = zip(scorer.names, scorer.terms, strict=True) if isinstance(scorer, WeightedSum) else ()
    return {n: any(map(is_graded, t.factors)) for n, t in terms if t.weight > 0} or {"": is_graded(scorer)}


def _of(part: str, scores: Sequence[Scored]) -> list[Scored]:
    """The scores of a part; "" is the whole."""
    return [
        m if m.result is None or not part else replace(m, result=RewardResult(m.result.parts[part])) for m in scores
    ]


def _fault(
    problems: Sequence[Problem],
    gold: Sequence[Scored],
    wrong: Sequence[Scored],
    none: Sequence[Scored],
    empty: Sequence[tuple[Problem, str]],
) -> str:
    """Return the worst fault of the scores; "" if there is none."""
    for (_, text), m in zip(empty, none, strict=True):
        if _right(m):
            return f"it gives {m.score:g} to {text!r}, which holds no answer: a model will find that out"
    if any(map(_right, wrong)):
        return "it gives 1 to the answers of other problems"
    for p, m in zip((p for p in problems if p.answer), gold, strict=True):
        if not _right(m):
            verdict = f"makes it fail ({m.failure.text})" if m.failure else f"scores {m.score}"
            return f"the reference answer {p.answer!r} of problem {p.id!r} {verdict}: is it what the reward looks for?"
    return ""


def _misgraded(gold: Sequence[Scored], wrong: Sequence[Scored], none: Sequence[Scored]) -> str:
    """Return the worst fault of the scores of a reward that grades; "" if there is none."""
    failures = [m.failure for m in (*gold, *wrong, *none) if m.failure is not None]
    if len(failures) > (len(gold) + len(wrong) + len(none)) / 20:
        return f"it fails on {len(failures)} answers; the first: {failures[0].text}"
    for others, what in ((wrong, "answers of other problems"), (none, "texts without an answer")):
        if gold and others and _mean(gold) <= _mean(others):
            return f"reference answers score no more than {what}: no policy can learn from that"
    return ""


def _right(m: Scored) -> bool:
    return m.score is not None and m.score >= RIGHT


def _mean(scores: Sequence[Scored]) -> float:
    return sum(m.score or 0.0 for m in scores) / len(scores) if scores else 0.0
