"""Samples training problems that are in no evaluation set, of this task or another; or returns all there are."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from drpo.errors import InputError
from drpo.seeds import derive
from drpo.tasks.task import FiniteTask, Task
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
    """Draw training problems; redraw those that are in `held_out`, ignoring white space and case.

    Two problems match if their conversations, without the system message, are equal, or if one ends with the other:
    examples before a question do not make it a different question. A task with the attribute `hidden_state` sets
    its evaluation problems aside itself: they differ in more than what the model reads first.

    Args:
        task: the task to train on.
        held_out: the evaluation problems, of this task or another.
        n: number of problems.
        step: index of the rollout, as for `Task.sample`.
        seed: the run's seed.
        fits: returns whether a problem may be used; None accepts all.

    Returns:
        n problems with distinct ids, a pure function of the arguments.

    Raises:
        InputError: nearly all problems of the task are held out or do not fit.

    Example:
        >>> from drpo.tasks import Addition
        >>> held_out = [Problem.of_text("0", f"What is {a} + {b}?", "") for a in range(1, 5) for b in range(2, 5)]
        >>> {p.prompt.split("+")[1] for p in sample_unseen(Addition(1, 4), held_out, n=8, step=0, seed=0)}
        {' 1?'}
    """
    is_unseen = _unseen(task, held_out)
    problems: list[Problem] = []
    for again in range(_TRIES):
        drawn = task.sample(n, step, derive("unseen", seed, again) if again else seed)
        if not drawn:
            raise InputError(f"{task}: its sample({n}, step={step}, seed=...) returned no problem")
        fresh = [p for p in drawn if is_unseen(p) and (fits is None or fits(p))]
        problems += [replace(p, id=f"{p.id}-again-{again}") for p in fresh] if again else fresh
        if len(problems) >= n:
            return problems[:n]
    why = "are in the evaluation set" + ("" if fits is None else " or are too long for the model")
    raise InputError(
        f"{task}: nearly all of its problems {why}; nothing is left to train on (where they differ in more than their "
        "messages, give the task the attribute hidden_state=True)"
    )


def training_pool(
    task: FiniteTask, held_out: Iterable[Problem], n: int, fits: Callable[[Problem], bool] | None = None
) -> dict[str, Problem]:
    """Return the problems that a curriculum chooses from, by id: those of the task that are not held out and that fit.

    Args:
        task: the task to train on.
        held_out: the evaluation problems, of this task or another.
        n: problems of a rollout.
        fits: returns whether a problem may be used; None accepts all.

    Raises:
        InputError: fewer than n are left.
    """
    is_unseen = _unseen(task, held_out)
    pool = {p.id: p for p in task.training_problems() if is_unseen(p) and (fits is None or fits(p))}
    if len(pool) < n:
        raise InputError(
            f"curriculum: {len(pool)} problems are there to train on, fewer than prompts={n}, which a rollout has; "
            f"set --prompts {max(1, len(pool))}, or leave --curriculum out"
        )
    return pool


def _unseen(task: Task, held_out: Iterable[Problem]) -> Callable[[Problem], bool]:
    """Return whether a problem of a task is in no evaluation set; see `sample_unseen`."""
    conversations = [] if getattr(task, "hidden_state", False) else [_conversations(p) for p in held_out]
    whole, ends = {c[0] for c in conversations}, {end for c in conversations for end in c}

    def is_unseen(problem: Problem) -> bool:
        own = _conversations(problem)
        return own[0] not in ends and whole.isdisjoint(own)

    return is_unseen


def _conversations(problem: Problem) -> list[str]:
    """Return the conversation from each of the user's messages on, the whole first."""
    messages = [m for m in problem.messages if m["role"] != "system"]
    starts = [i for i, m in enumerate(messages) if m["role"] == "user"] or [0]
    return ["".join("".join(str(m["content"]) for m in messages[i:]).split()).casefold() for i in starts]
