"""Completions -> marked groups."""

from collections.abc import Sequence

import torch

from drpo.errors import InputError
from drpo.rewards import Mark, RewardPool
from drpo.types import Completion, Group, Problem, Unmarked


def score(problems: Sequence[Problem], completions: Sequence[Completion], pool: RewardPool) -> list[Group]:
    """Mark every completion and put those of each problem together.

    A reward that raises, times out or returns something that is not a number leaves its completion out of the group,
    with the reason; one that returns None abstains, which leaves it out too.

    Args:
        problems: of the rollout, with unique ids.
        completions: of these problems, in any order.
        pool: runs the reward.

    Returns:
        One group per problem, in the order of `problems`, samples in order.

    """
    ordered = sorted(completions, key=lambda c: c.sample)
    by_problem = {p.id: [c for c in ordered if c.problem_id == p.id] for p in problems}
    items = [(p, c) for p in problems for c in by_problem[p.id]]
    marks = pool.score([(p, c.text) for p, c in items])
    marked = list(zip((c for _, c in items), marks, strict=True))
    return [_group(p, [(c, m) for c, m in marked if c.problem_id == p.id]) for p in problems]


def require_marked(groups: Sequence[Group]) -> None:
    """Refuse a rollout of which the reward marked nothing.

    Raises:
        InputError: it failed on, or abstained from, every completion.
    """
    unmarked = [u for g in groups for u in g.unmarked]
    if unmarked and not any(g.completions for g in groups):
        failures = [u.failure for u in unmarked if u.failure is not None]
        what = f"failed on {len(failures)}; the first: {failures[0]}" if failures else "abstained every time"
        raise InputError(f"the reward marked none of the {len(unmarked)} completions of a rollout: it {what}")


def _group(problem: Problem, marked: Sequence[tuple[Completion, Mark]]) -> Group:
    scored = [(c, m.score) for c, m in marked if m.score is not None]
    return Group(
        problem=problem,
        completions=tuple(c for c, _ in scored),
        rewards=torch.tensor([s for _, s in scored], dtype=torch.float32),
        unmarked=tuple(Unmarked(c, m.failure) for c, m in marked if m.score is None),
    )
