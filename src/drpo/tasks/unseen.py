"""Training problems that no evaluation asks, whichever task the evaluation is of."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from drpo.errors import InputError
from drpo.seeds import derive
from drpo.tasks.task import Task
from drpo.types import Problem

_TRIES = 64


def sample_unseen(
    task: Task,
    held_out: Iterable[Problem],
    n: int,
    step: int,
    seed: int,
    fits: Callable[[Problem], bool] | None = None,
) -> list[Problem]:
    """Draw training problems, drawing again whatever stands among `held_out`; neither white space nor case counts.

    A problem stands there where its conversation, system message aside, equals one of these, or ends as one of these
    does: with examples before it or without, a question is the same question.

    Args:
        task: to train on.
        held_out: the problems that are evaluated on, of this task or another.
        n: how many to draw.
        step: which rollout, as for `Task.sample`.
        seed: the run's.
        fits: says whether a problem may be used; None for any.

    Returns:
        n problems with ids of their own, a pure function of the arguments.

    Raises:
        InputError: nearly everything that the task has is held out, or does not fit.

    Example:
        >>> from drpo.tasks import Addition
        >>> held_out = [Problem.of_text("0", f"What is {a} + {b}?", "") for a in range(1, 5) for b in range(2, 5)]
        >>> {p.prompt.split("+")[1] for p in sample_unseen(Addition(1, 4), held_out, n=8, step=0, seed=0)}
        {' 1?'}
    """
    conversations = [_conversations(p) for p in held_out]
    whole, ends = {c[0] for c in conversations}, {end for c in conversations for end in c}
    found: list[Problem] = []
    for again in range(_TRIES):
        drawn = task.sample(n, step, derive("unseen", seed, again) if again else seed)
        unseen = [p for p in drawn if (c := _conversations(p))[0] not in ends and whole.isdisjoint(c)]
        fresh = [p for p in unseen if fits is None or fits(p)]
        found += [replace(p, id=f"{p.id}-again-{again}") for p in fresh] if again else fresh
        if len(found) >= n:
            return found[:n]
    why = "stand in the evaluation set" + ("" if fits is None else " or are too long for the model")
    raise InputError(f"{task}: nearly all of its problems {why}; nothing is left to train on")


def _conversations(problem: Problem) -> list[str]:
    """What is said from each of the user's messages on, the whole first."""
    said = [m for m in problem.messages if m["role"] != "system"]
    starts = [i for i, m in enumerate(said) if m["role"] == "user"] or [0]
    return ["".join("".join(str(m["content"]) for m in said[i:]).split()).casefold() for i in starts]
