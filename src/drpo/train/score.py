"""Completions -> marked groups."""

from collections.abc import Sequence

import torch

from drpo.errors import InputError
from drpo.rewards import Mark, Marking, RewardPool
from drpo.types import Completion, Group, Problem, Unmarked


def score(problems: Sequence[Problem], completions: Sequence[Completion], pool: RewardPool) -> list[Group]:
    """Mark every completion and put those of each problem together.

    A reward that returns None abstains, which leaves its completion out of the group. One that raises, times out, dies
    or returns something that is not a finite number has failed: then `pool.marking.on_failure` says whether the
    completion is left out too or scores 0; either way the group says why.

    Args:
        problems: of the rollout, with unique ids.
        completions: of these problems, in any order.
        pool: runs the reward, and says what becomes of failures.

    Returns:
        One group per problem, in the order of `problems`, samples in order.
    """
    ordered = sorted(completions, key=lambda c: c.sample)
    by_problem = {p.id: [c for c in ordered if c.problem_id == p.id] for p in problems}
    items = [(p, c) for p in problems for c in by_problem[p.id]]
    marks = pool.score([(p, c.text) for p, c in items])
    zero = pool.marking.on_failure == "zero"
    marked = list(zip((c for _, c in items), marks, strict=True))
    return [_group(p, [(c, m) for c, m in marked if c.problem_id == p.id], zero) for p in problems]


def require_marked(groups: Sequence[Group], marking: Marking) -> None:
    """Refuse a rollout of which nothing has a score, and a failed reward where failures are to be errors.

    Args:
        groups: of the whole rollout, whoever marked them.
        marking: says what a failure is.

    Raises:
        InputError: no completion got a score, or the reward failed and `on_failure` is error.
    """
    failed = [(g.problem.id, failure) for g in groups for failure in g.failures]
    total = sum(len(g.completions) + len(g.unmarked) for g in groups)
    if failed and marking.on_failure == "error":
        where, first = failed[0]
        raise InputError(
            f"the reward failed on {len(failed)} of {total} completions, first on one of problem {where!r}: "
            f"{first.text}; --marking.on-failure drop or zero goes on without"
        )
    if total and not any(g.completions for g in groups):
        what = f"failed on {len(failed)}; the first: {failed[0][1].text}" if failed else "abstained every time"
        raise InputError(f"the reward marked none of the {total} completions of a rollout: it {what}")


def _group(problem: Problem, marked: Sequence[tuple[Completion, Mark]], zero: bool) -> Group:
    """Put a problem's completions together; `zero` scores 0 where the reward failed."""
    marks = [(c, 0.0 if zero and m.failure else m.score, m.failure) for c, m in marked]
    scored = [(c, s) for c, s, _ in marks if s is not None]
    return Group(
        problem=problem,
        completions=tuple(c for c, _ in scored),
        rewards=torch.tensor([s for _, s in scored], dtype=torch.float32),
        unmarked=tuple(Unmarked(c, f) for c, s, f in marks if s is None),
        zeroed=tuple(Unmarked(c, f) for c, s, f in marks if s is not None and f is not None),
    )
