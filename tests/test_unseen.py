"""No problem that is evaluated on is ever sampled, whichever task the evaluation is of."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from drpo.errors import InputError
from drpo.tasks import Addition, sample_unseen
from drpo.types import Problem


@dataclass(frozen=True)
class Cards:
    """Four questions in seeded order, as a set that is gone through again and again."""

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        return [Problem.of_text(f"{step}-{i}", "ABCD"[(seed + step * n + i) % 4], "") for i in range(n)]


@pytest.mark.parametrize("step", range(8))
def test_what_is_held_out_is_drawn_again(step: int):
    drawn = sample_unseen(
        Cards(), [Problem.of_text("0", " b", ""), Problem.of_text("1", "C", "")], n=6, step=step, seed=3
    )
    assert len(drawn) == 6 and {p.prompt for p in drawn} == {"A", "D"}
    assert len({p.id for p in drawn}) == 6  # ids seed the samples, so they have to differ
    assert drawn == sample_unseen(
        Cards(), [Problem.of_text("0", "B", ""), Problem.of_text("1", "c ", "")], n=6, step=step, seed=3
    )


def after(*earlier: str) -> Problem:
    """The question B after other turns."""
    turns = [{"role": role, "content": text} for text in earlier for role in ("user", "assistant")]
    return Problem(
        "0", ({"role": "system", "content": "Be brief."}, *turns, *Problem.of_text("0", "B", "").messages), ""
    )


def test_a_question_is_the_same_with_examples_before_it_or_without():
    class Shown(Cards):
        def sample(self, n: int, step: int, seed: int) -> list[Problem]:
            return [replace(after("x", "y"), id=f"{step}-{i}") for i in range(n)]

    for held_out in (after("x", "y"), after("y"), after()):
        with pytest.raises(InputError, match="nothing is left to train on"):
            sample_unseen(Shown(), [held_out], n=2, step=0, seed=0)
    for held_out in (after("z"), after("z", "y"), Problem.of_text("0", "y", "")):  # another conversation
        assert len(sample_unseen(Shown(), [held_out], n=2, step=0, seed=0)) == 2
    assert {p.prompt for p in sample_unseen(Cards(), [after("x")], n=6, step=0, seed=3)} == {"A", "C", "D"}


def test_nothing_changes_where_nothing_is_shared():
    task = Addition(1, 20)
    assert sample_unseen(task, task.held_out(200), n=16, step=5, seed=0) == task.sample(16, 5, 0)


def test_a_task_that_is_all_held_out_says_so():
    with pytest.raises(InputError, match="nothing is left to train on"):
        sample_unseen(Cards(), [Problem.of_text("0", x, "") for x in "ABCD"], n=2, step=0, seed=0)


def test_a_task_without_problems_is_said_to_have_none():
    with pytest.raises(InputError, match=r"sample\(2, step=0, seed=...\) returned no problem"):
        sample_unseen(SimpleNamespace(sample=lambda n, step, seed: []), [], n=2, step=0, seed=0)
