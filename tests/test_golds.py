"""Reference answers score 1 against themselves, and no time-out of math-verify passes for a wrong answer."""

from pathlib import Path

import pytest

import drpo.rewards.math
from drpo.rewards import RewardConfig, RewardPool
from drpo.rewards.math import math_verify
from drpo.types import Problem
from support import golds

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "rewards.md"


@pytest.fixture(scope="module")
def pool():
    with RewardPool(math_verify, RewardConfig(processes=2)) as pool:
        yield pool


def answers(name):
    if not (golds.DATA / golds.SETS[name][0]).exists():
        pytest.skip(f"{golds.DATA} is not there; set DRPO_SHARED to the folder that holds data/")
    return golds.answers(name)


@pytest.mark.parametrize("name", golds.SETS)
def test_a_sample_of_the_reference_answers_scores_1(pool, name):
    result = golds.marked(answers(name)[::40], pool)
    assert result.answers and result.exceptions == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", golds.SETS)
def test_every_reference_answer_scores_1_but_for_the_documented_exceptions(pool, name):
    assert golds.line(name, golds.marked(answers(name), pool)) in DOCUMENT.read_text().splitlines()


def test_an_exception_would_show(pool):
    assert golds.marked(["5", " ", "5"], pool).exceptions[0][0] == " "
    assert golds.line("set", golds.Result(3, 2, (("x", "0.0"),))) == "| set | 3 | 2 | `x`: 0.0 |"


ENDLESS = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{100000000!}", r"\boxed{\sum_{k=1}^{10^9} \frac{1}{k}}"]


def test_a_timeout_is_a_failure_and_not_a_wrong_answer():
    with RewardPool(math_verify, RewardConfig(processes=2, seconds=1.0)) as pool:
        marks = pool.score([(Problem.of_text("0", "", "5"), text) for text in [*ENDLESS, r"\boxed{5}", r"\boxed{6}"]])
    assert [m.failure and m.failure.kind for m in marks] == ["timed_out"] * 3 + [None] * 2
    assert [m.score for m in marks] == [None] * 3 + [1.0, 0.0]


@pytest.mark.parametrize("part", ["parse", "verify"])
def test_running_out_of_memory_is_a_failure_and_any_other_exception_a_wrong_answer(monkeypatch, part):
    raised = MemoryError()
    real = getattr(drpo.rewards.math, part)

    def exhausted(value, *others, **options):
        if part == "parse" and "6" not in value:  # the reference answer
            return real(value, *others, **options)
        raise raised

    monkeypatch.setattr(drpo.rewards.math, part, exhausted)
    with pytest.raises(MemoryError):
        math_verify(Problem.of_text("0", "", "5"), r"\boxed{6}")
    raised = RecursionError()
    assert math_verify(Problem.of_text("0", "", "5"), r"\boxed{6}") == 0.0
