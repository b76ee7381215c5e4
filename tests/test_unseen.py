"""No problem that is evaluated on is ever sampled, whichever task the evaluation is of."""

from dataclasses import dataclass

import pytest

from drpo.errors import InputError
from drpo.tasks import Addition, sample_unseen
from drpo.types import Problem


@dataclass(frozen=True)
class Cards:
    """Four questions in seeded order, as a set that is gone through again and again."""

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        return [Problem(f"{step}-{i}", "ABCD"[(seed + step * n + i) % 4], "") for i in range(n)]


@pytest.mark.parametrize("step", range(8))
def test_what_is_held_out_is_drawn_again(step: int):
    drawn = sample_unseen(Cards(), [Problem("0", " b", ""), Problem("1", "C", "")], n=6, step=step, seed=3)
    assert len(drawn) == 6 and {p.prompt for p in drawn} == {"A", "D"}
    assert len({p.id for p in drawn}) == 6  # ids seed the samples, so they have to differ
    assert drawn == sample_unseen(Cards(), [Problem("0", "B", ""), Problem("1", "c ", "")], n=6, step=step, seed=3)


def test_nothing_changes_where_nothing_is_shared():
    task = Addition(1, 20)
    assert sample_unseen(task, task.held_out(200), n=16, step=5, seed=0) == task.sample(16, 5, 0)


def test_a_task_that_is_all_held_out_says_so():
    with pytest.raises(InputError, match="nothing is left to train on"):
        sample_unseen(Cards(), [Problem("0", x, "") for x in "ABCD"], n=2, step=0, seed=0)
