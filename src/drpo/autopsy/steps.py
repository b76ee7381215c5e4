"""The rollouts of one step as the product's own records, and the figures of the step as the trainer computes them.

Shapes: R rollouts of a step, T of their sampled tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drpo.autopsy.dumped import Column, Dumped
from drpo.checks import all_equal, slack
from drpo.credit import advantages
from drpo.objectives import Objective, gradient
from drpo.train.log import advantage_record, decimals, rollout_records
from drpo.train.metrics import episode_metrics, reward_metrics, token_metrics
from drpo.types import Episode, Failure, Problem, RewardResult, Sampling, ScoredGroup, Tokens, TokenSequence, TokenStats
from drpo.types.problem import message
from drpo.types.rollout import Unscored

_SAMPLING = Sampling()
"""A dump does not say how it was sampled; nothing here reads it."""
_NO_PROMPT = torch.empty(0, dtype=torch.int64)
UNKNOWN_VERSION = -1
ROUNDING = 0.01
"""Advantages below it are rounding errors, where all rewards of a group are equal to float32."""


def scored_groups(rollouts: Sequence[Dumped]) -> list[ScoredGroup]:
    """Return the rollouts of a step as scored groups, ordered by their first rollouts.

    An episode has a token sequence where the dump has ids and the sampler's log-probabilities.

    Args:
        rollouts: of one step.
    """
    sequences = _sequences(rollouts)
    return [_group(name, members, sequences) for name, members in by_group(rollouts).items()]


def by_group(rollouts: Sequence[Dumped]) -> dict[str, list[Dumped]]:
    """Return the rollouts of each group."""
    groups: dict[str, list[Dumped]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return groups


def _group(name: str, members: Sequence[Dumped], sequences: Mapping[int, TokenSequence]) -> ScoredGroup:
    problem = Problem.of_text(name, members[0].prompt, members[0].answer)
    episodes = [_episode(problem, i, r, sequences.get(id(r))) for i, r in enumerate(members)]
    pairs = list(zip(episodes, members, strict=True))
    scored = [(e, RewardResult(r.reward, r.parts)) for e, r in pairs if r.reward is not None]
    unscored = [(e, r.failure) for e, r in pairs if r.reward is None]
    return ScoredGroup(
        problem,
        tuple(e for e, _ in scored),
        tuple(result for _, result in scored),
        tuple(Unscored(e, None if text is None else Failure("raised", text)) for e, text in unscored),
    )


def _episode(problem: Problem, sample: int, rollout: Dumped, sequence: TokenSequence | None) -> Episode:
    return Episode(
        problem_id=problem.id,
        sample=sample,
        messages=(*problem.messages, message("assistant", rollout.text)),
        prompt=rollout.prompt,
        text=rollout.text,
        finish_reason="length" if rollout.cut else "stop",
        sampling=_SAMPLING,
        turns=(rollout.length,),
        sequences=() if sequence is None else (sequence,),
    )


def _sequences(rollouts: Sequence[Dumped]) -> dict[int, TokenSequence]:
    """Return identity of a rollout -> its token sequence, where it has tokens with ids and the sampler's log-probs."""
    known = [r for r in rollouts if r.length and r.token_ids is not None and r.behavior_logp is not None]
    if not known:
        return {}
    ids, mu = (torch.from_numpy(_flat([getattr(r, name) for r in known])) for name in ("token_ids", "behavior_logp"))
    columns = (ids, torch.ones_like(ids, dtype=torch.bool), mu, torch.full_like(ids, UNKNOWN_VERSION))
    parts = zip(*(column.split([r.length for r in known]) for column in columns), strict=True)
    return {id(r): TokenSequence(_NO_PROMPT, *part) for r, part in zip(known, parts, strict=True)}


@dataclass(frozen=True, eq=False)
class StepTokens:
    """The T tokens of a step with two valid log-probabilities, and their entropy.

    Args:
        tokens: as an objective receives them; `sequence` is the rollout's number within the step.
        entropy: [T] nats; the policy's, or, where the dump lacks it, -log mu, whose mean estimates it.
    """

    tokens: Tokens
    entropy: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each rollout that has some."""
        _, counts = self.tokens.sequence.unique_consecutive(return_counts=True)
        return [int(n) for n in counts]


def step_tokens(rollouts: Sequence[Dumped], pushed: Sequence[Any]) -> StepTokens | None:
    """Return the tokens of a step that have both log-probabilities; None without any.

    Args:
        rollouts: of the step.
        pushed: the advantages of each rollout, [M] or [1]; a rollout with None is left out.
    """
    rows = [
        (i, r, a)
        for i, (r, a) in enumerate(zip(rollouts, pushed, strict=True))
        if r.behavior_logp is not None and r.logp is not None and a is not None and r.length
    ]
    if not rows:
        return None
    mu, logp = (_flat([getattr(r, name) for _, r, _ in rows]) for name in ("behavior_logp", "logp"))
    entropy = _flat([r.behavior_logp if r.entropy is None else r.entropy for _, r, _ in rows])
    estimated = np.repeat([r.entropy is None for _, r, _ in rows], [r.length for _, r, _ in rows])
    advantage = _flat([a if len(a) == r.length else np.repeat(a, r.length) for _, r, a in rows])
    sequence = np.repeat([i for i, _, _ in rows], [r.length for _, r, _ in rows])
    sound = _is_logp(mu) & (logp <= slack(torch.float32))
    mu, logp, advantage, sequence, entropy, estimated = (
        column[sound] for column in (mu, logp, advantage, sequence, entropy, estimated)
    )
    entropy = np.where(estimated, -entropy, entropy)
    columns = [torch.from_numpy(np.ascontiguousarray(c)) for c in (logp, mu, advantage, sequence, entropy)]
    keep = torch.ones(len(mu), dtype=torch.bool)
    return StepTokens(
        Tokens(columns[0], columns[1], columns[2].float(), keep, columns[3].long()),
        columns[4].float(),
    )


def _flat(columns: Sequence[Any]) -> Any:
    return np.concatenate(columns)


def advantages_of(rollouts: Sequence[Dumped]) -> list[Any]:
    """Return each rollout's advantages: the dump's, else reward - group mean; None where unknown.

    Where all rewards of a group are equal, advantages below `ROUNDING` become 0: they are rounding errors, enlarged by
    the division in (R - mean) / (std + 1e-4).
    """
    known: list[Any] = [r.advantages for r in rollouts]
    places: dict[str, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        if rollout.reward is not None:
            places.setdefault(rollout.group, []).append(i)
    for of_group in places.values():
        if len(of_group) < 2:
            continue
        rewards = torch.tensor([rollouts[i].reward for i in of_group], dtype=torch.float32)
        if any(known[i] is None for i in of_group):
            centered = advantages.mean(rewards).numpy().reshape(-1, 1)
            for i, own in zip(of_group, centered, strict=True):
                known[i] = own if known[i] is None else known[i]
        elif all_equal(rewards) and max(float(np.abs(known[i]).max(initial=0)) for i in of_group) < ROUNDING:
            for i in of_group:
                known[i] = np.zeros_like(known[i])
    return known


def groups_with_signal(rollouts: Sequence[Dumped], pushed: Sequence[Any]) -> list[bool]:
    """Return for each group whether any of its advantages is not 0."""
    carries: dict[str, bool] = {}
    for rollout, own in zip(rollouts, pushed, strict=True):
        carries[rollout.group] = carries.get(rollout.group, False) or (own is not None and bool(own.any()))
    return list(carries.values())


def step_figures(step: int, rollouts: Sequence[Dumped], objective: Objective) -> dict[str, Any]:
    """Return a step's record, with the names of `metrics.jsonl`.

    A figure is absent where the dump lacks its data. `grad_norm` is the norm of the mean loss's gradient in log pi,
    over tokens; without tokens, the norm of the advantages over rollouts. It is 0 where the trainer's is.

    Args:
        step: as the dump counts it.
        rollouts: of it.
        objective: gives the gradient and the region.
    """
    groups, pushed = scored_groups(rollouts), advantages_of(rollouts)
    record: dict[str, Any] = {"step": step, **_episode_figures(rollouts, groups)}
    if any(r.reward is not None for r in rollouts):
        record |= reward_metrics(groups)
    elif any(r.failure is not None for r in rollouts):
        record["reward_failed"] = sum(r.failure is not None for r in rollouts)
    elif rollouts[0].reward_mean is not None:
        record["reward_mean"] = rollouts[0].reward_mean
    if any(a is not None for a in pushed):
        with_signal = groups_with_signal(rollouts, pushed)
        if len(with_signal) < len(rollouts):  # else every rollout is by itself: which are of one group is not known
            record["groups_with_signal"] = sum(with_signal) / len(with_signal)
    tokens = step_tokens(rollouts, pushed)
    if tokens is not None and len(tokens.entropy):
        return record | _token_figures(objective, tokens) | _first_update(rollouts, pushed, objective)
    known = [a for a in pushed if a is not None and len(a)]
    if known:
        record["grad_norm"] = float(np.sqrt(sum(float(np.square(a).mean()) for a in known))) / len(known)
    entropy = _estimated_entropy(rollouts)
    return record | ({} if entropy is None else {"entropy": entropy})


def _episode_figures(rollouts: Sequence[Dumped], groups: Sequence[ScoredGroup]) -> dict[str, float]:
    figures = episode_metrics([e for g in groups for e in g.all_episodes])
    if any(r.cut is None for r in rollouts):
        figures = {k: v for k, v in figures.items() if k not in ("truncated", "length_truncated")}
    if any(r.token_ids is None for r in rollouts):
        figures = {k: v for k, v in figures.items() if k != "sampled_tokens"}
    return figures


def _token_figures(objective: Objective, of_step: StepTokens) -> dict[str, float]:
    slope = gradient(objective, of_step.tokens)
    figures = token_metrics(objective, TokenStats(of_step.tokens, of_step.entropy, slope, {}))
    return figures | {"grad_norm": float(slope.double().norm()) / len(slope)}


def _first_update(
    rollouts: Sequence[Dumped], pushed: Sequence[Any], objective: Objective
) -> dict[str, list[dict[str, float]]]:
    """Return the figures of a step's first update alone, where the step has several."""
    chosen = [(r, a) for r, a in zip(rollouts, pushed, strict=True) if r.update == 0]
    if len(chosen) in (0, len(rollouts)):
        return {}
    tokens = step_tokens([r for r, _ in chosen], [a for _, a in chosen])
    return {"updates": [_token_figures(objective, tokens)]} if tokens is not None and len(tokens.entropy) else {}


def _estimated_entropy(rollouts: Sequence[Dumped]) -> float | None:
    """Return the mean of -log mu over the sampled tokens, an estimate of the entropy; None without valid ones."""
    known = [r.behavior_logp for r in rollouts if r.behavior_logp is not None]
    if not known:
        return None
    mu = _flat(known).astype(np.float64)
    sound = _is_logp(mu)
    return float(-mu[sound].mean()) if sound.any() else None


def broken_logp(rollouts: Sequence[Dumped]) -> tuple[int, set[tuple[str, str]]]:
    """Return the number of tokens with a broken log-probability, and how: pairs of a column and what it is."""
    n, kinds = 0, set()
    for rollout in rollouts:
        broken = np.zeros(rollout.length, dtype=bool)
        for name, column in (("behavior_logp", rollout.behavior_logp), ("logp", rollout.logp)):
            if column is None:
                continue
            none = np.isnan(column) if name == "logp" else ~(column > -np.inf)  # the policy may have lost a token
            positive = column > slack(torch.float32)
            kinds |= {(name, how) for how, where in (("no number", none), ("positive", positive)) if where.any()}
            broken |= none | positive
        n += int(broken.sum())
    return n, kinds


def _is_logp(mu: Column) -> Column:
    """Return where a log-probability is valid: finite, and at most 0 up to rounding."""
    return np.isfinite(mu) & (mu <= slack(torch.float32))


def records_of(step: int, rollouts: Sequence[Dumped]) -> Iterator[dict[str, Any]]:
    """Yield the rollouts of a step as records of `rollouts.jsonl`, without the weights' version, which no dump has."""
    groups, pushed = scored_groups(rollouts), advantages_of(rollouts)
    members = [r for of_group in by_group(rollouts).values() for r in of_group]
    own = {id(r): a for r, a in zip(rollouts, pushed, strict=True)}
    episodes = [e for g in groups for e in sorted(g.all_episodes, key=lambda e: e.sample)]
    trained = {
        e.sequences[0]: _trained(r, own[id(r)])
        for e, r in zip(episodes, members, strict=True)
        if e.sequences and own[id(r)] is not None and r.length
    }
    for record in rollout_records(step, groups, trained):
        yield {name: value for name, value in record.items() if name != "version"}


def _trained(rollout: Dumped, own: Any) -> Mapping[str, Any]:
    advantage = torch.from_numpy(np.broadcast_to(own, rollout.length).astype(np.float32))
    seen = {"update": rollout.update, **advantage_record(advantage)}
    if rollout.logp is None or not _sound(rollout):
        return seen
    return seen | {"logp": decimals(torch.from_numpy(rollout.logp))}


def _sound(rollout: Dumped) -> bool:
    known = [c for c in (rollout.logp, rollout.behavior_logp) if c is not None]
    return all(bool(_is_logp(column).all()) for column in known)
