"""Episodes -> scored groups."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from drpo.errors import InputError
from drpo.rewards import RewardConfig, RewardPool, Scored
from drpo.rewards.usage import total as total_usage
from drpo.types import Episode, Failure, Problem, RewardResult, ScoredGroup, Unscored


def score(problems: Sequence[Problem], rollout: Sequence[Sequence[Episode]], pool: RewardPool) -> list[ScoredGroup]:
    """Score every episode.

    A reward that returns None abstains: its episode is left out of the group. A reward fails if it raises, times out,
    dies or returns something that is not a finite number: `pool.config.on_failure` then leaves the episode out or
    scores it 0. The group records the failure in both cases. An
    environment that fails counts as a failed reward; its rewards of turns are added to the reward's own.

    Args:
        problems: the problems of the rollout.
        rollout: the episodes of each problem.
        pool: runs the reward; its configuration decides about failures.

    Returns:
        One group per problem, in the order of `problems`, its episodes in order.
    """
    groups = list(zip(problems, rollout, strict=True))
    whole = [(problem, e.transcript) for problem, episodes in groups for e in episodes if _failure(e) is None]
    scores = iter(pool.score(whole))
    zero = pool.config.on_failure == "zero"
    return [_group(problem, [(e, _scored(e, scores)) for e in episodes], zero) for problem, episodes in groups]


def _failure(episode: Episode) -> Failure | None:
    return None if episode.played is None else episode.played.failure


def _scored(episode: Episode, scores: Iterator[Scored]) -> Scored:
    """An episode's next score, with what its environment gave for each turn; that of a failed environment has none."""
    failure = _failure(episode)
    if failure is not None:
        return Scored(None, failure, 0.0)
    scored = next(scores)
    if episode.played is None or scored.result is None or not any(episode.played.rewards):
        return scored
    turns = scored.result.turns or (0.0,) * len(episode.turns)
    both = tuple(map(_plus, turns, episode.played.rewards))
    return replace(scored, result=replace(scored.result, turns=both))


def _plus(reward: float | tuple[float, ...], of_turn: float) -> float | tuple[float, ...]:
    """A turn's reward and the environment's; one for each token gets the environment's at the last."""
    return (*reward[:-1], reward[-1] + of_turn) if isinstance(reward, tuple) else reward + of_turn


def require_scored(groups: Sequence[ScoredGroup], config: RewardConfig) -> None:
    """Raise if a rollout has no score at all, or if a reward failed and `on_failure` is "error".

    Args:
        groups: the groups of the whole rollout, on all ranks.
        config: the reward pool's configuration.

    Raises:
        InputError: no completion has a score, or a failure is an error.
    """
    failed = [(g.problem.id, failure) for g in groups for failure in g.failures]
    total = sum(len(g.episodes) + len(g.unscored) for g in groups)
    if failed and config.on_failure == "error":
        where, first = failed[0]
        raise InputError(
            f"the reward failed on {len(failed)} of {total} completions, first on one of problem {where!r}: "
            f"{first.text}; --reward-pool.on-failure drop or zero goes on without"
        )
    if total and not any(g.episodes for g in groups):
        what = f"failed on {len(failed)}; the first: {failed[0][1].text}" if failed else "abstained every time"
        raise InputError(f"the reward scored none of the {total} completions of a rollout: it {what}")


def _group(problem: Problem, pairs: Sequence[tuple[Episode, Scored]], zero: bool) -> ScoredGroup:
    """Return the group of a problem's episodes; with `zero`, failed rewards score 0, where there is a turn to score."""
    scores = [(e, RewardResult(0.0) if zero and m.failure and e.turns else m.result, m.failure) for e, m in pairs]
    scored = [(e, result) for e, result, _ in scores if result is not None]
    return ScoredGroup(
        problem=problem,
        episodes=tuple(e for e, _ in scored),
        results=tuple(result for _, result in scored),
        unscored=tuple(Unscored(e, f) for e, s, f in scores if s is None),
        scored_zero=tuple(Unscored(e, f) for e, s, f in scores if s is not None and f is not None),
        usage=total_usage(m.usage for _, m in pairs),
    )
