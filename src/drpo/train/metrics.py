"""The metrics of a run: each is a ratio of sums over all its items, never a mean of means."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from drpo.credit.gae import explained_variance
from drpo.credit.overlong import PART as OVERLONG
from drpo.objectives import MAX_LOG_RATIO, Objective, out_of_region, prob_diff, ratio
from drpo.objectives.contract import weight_of_gradient
from drpo.objectives.ratios import log_ratio
from drpo.rewards.usage import total as total_usage
from drpo.train.metric_tables import ENDPOINT_METRICS, MOST_TURNS, REWARD_PARTS
from drpo.types import (
    Batch,
    Credit,
    CriticStats,
    Episode,
    FailureKind,
    ScoredGroup,
    StepStats,
    Tokens,
    TokenSequence,
    TokenStats,
)
from drpo.types.routes import known


def rollout_metrics(step: int, groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Return the figures of `ROLLOUT_METRICS` for the rollout of a step, counted from 1."""
    episodes = [e for g in groups for e in g.all_episodes]
    ages = [step - 1 - e.version for e in episodes if e.sequences]
    staleness = {"staleness": sum(ages) / len(ages), "staleness_max": max(ages)}
    return (
        reward_metrics(groups)
        | episode_metrics(episodes)
        | staleness
        | endpoint_metrics(groups)
        | _turn_metrics(episodes)
    )


def reward_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Return those of `ROLLOUT_METRICS` that are about rewards; at least one episode has one."""
    of_groups = [g.rewards for g in groups]
    rewards = torch.cat(of_groups).double()
    scored = [r for r in of_groups if len(r)]
    unscored = [u for g in groups for u in g.unscored]
    failures = [f for g in groups for f in g.failures]
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std(correction=0)),
        "groups_all_correct": sum(bool((r >= 1).all()) for r in scored) / len(scored),
        "groups_all_wrong": sum(bool((r <= 0).all()) for r in scored) / len(scored),
        "frac_reward_zero_std": sum(g.equal_rewards for g in groups if g.results) / len(scored),
        "reward_failed": len(failures),
        **{f"reward_{kind}": sum(f.kind == kind for f in failures) for kind in get_args(FailureKind)},
        "reward_abstained": sum(u.failure is None for u in unscored),
        **{f"{REWARD_PARTS}{name}": mean for name, mean in part_means(groups).items()},
        **_no_number(groups),
    }


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return those of `ROLLOUT_METRICS` that are about lengths, of at least one episode."""
    return {
        "truncated": sum(e.finish_reason == "length" for e in episodes) / len(episodes),
        "sampled_tokens": sum(e.n_sampled for e in episodes),
        **_mean_length("length_terminated", episodes, "stop"),
        **_mean_length("length_truncated", episodes, "length"),
    }


def endpoint_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Return the figures of `ENDPOINT_METRICS`; none where no reward asked an endpoint."""
    usage = total_usage(g.usage for g in groups)
    return {name: usage.get(name, 0) for name in ENDPOINT_METRICS} if usage else {}


def _turn_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return the figures of `TURN_METRICS`; none where no episode is in an environment."""
    played = [e.played for e in episodes if e.played is not None]
    turns = [len(e.turns) for e in episodes]
    if not played or not sum(turns):
        return {}
    n = len(episodes)
    return {
        "turns": sum(turns) / n,
        "turns_max": max(turns),
        "turn_tokens": sum(e.n_sampled for e in episodes) / sum(turns),
        "episodes_done": sum(p.done for p in played) / n,
        "calls": sum(sum(p.calls) for p in played) / n,
        "failed_calls": sum(sum(p.failed_calls) for p in played) / n,
        "branches": sum(max(0, len(e.sequences) - 1) for e in episodes) / n,
        "environment_failed": sum(p.failure is not None for p in played),
    }


def part_means(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Return the mean of each part of the reward, by name, over the scored episodes that have it."""
    results = [result for g in groups for result in g.results]
    names = sorted({name for result in results for name in result.parts})
    values = {name: [result.parts[name] for result in results if name in result.parts] for name in names}
    return {name: sum(of_one) / len(of_one) for name, of_one in values.items()}


def _no_number(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Return the share of texts without a digit, of problems whose answer has one; empty without such problems."""
    numeric = [g for g in groups if _has_digit(g.problem.answer)]
    texts = [e.text for g in numeric for e in g.all_episodes]
    return {"no_number": sum(not _has_digit(text) for text in texts) / len(texts)} if texts else {}


_DIGIT = re.compile("[0-9]")


def _has_digit(text: str) -> bool:
    return any(map(str.isdigit, text)) if not text.isascii() else _DIGIT.search(text) is not None


def _mean_length(name: str, episodes: Sequence[Episode], finish_reason: str) -> dict[str, float]:
    lengths = [e.n_sampled for e in episodes if e.finish_reason == finish_reason]
    return {name: sum(lengths) / len(lengths)} if lengths else {}


def token_metrics(objective: Objective, stats: TokenStats) -> dict[str, float]:
    """Return the figures of `TOKEN_METRICS`, those of `REGION_METRICS` where the objective has a region, those of
    `DIVERGENCE_METRICS` where the tokens carry a divergence, and the mean of each of the objective's own metrics.

    The objective's gradient and metrics are those of the training pass: it is not evaluated again.

    Args:
        objective: what they are trained with.
        stats: of T tokens; those not kept count nowhere.

    Returns:
        name -> figure; only the count where there are no tokens.
    """
    stats = _kept(stats)
    tokens, n = stats.tokens, len(stats.entropy)
    if n == 0:
        return {"trained_tokens": 0}
    distance = prob_diff(tokens).abs()
    r = ratio(tokens)
    w = weight_of_gradient(tokens, stats.gradient)
    log_r = log_ratio(tokens)
    return {
        "entropy": float(stats.entropy.double().mean()),
        "prob_diff_mean": float(distance.double().mean()),
        "prob_diff_p99": _p99(distance),
        "masked": float((w <= 0).double().mean()),
        "weight_min": float(w.min()),
        "weight_mean": float(w.double().mean()),
        "weight_max": float(w.max()),
        "ratio_mean": float(r.double().mean()),
        "ratio_max": float(r.max()),
        "scaled_weight_max": float((r * w).abs().max()),
        "ratio_capped": int((log_r > MAX_LOG_RATIO).sum()),
        "k3": float((prob_diff(tokens, power=1.0) - log_r).double().mean()),
        "trained_tokens": n,
        **_region_metrics(objective, tokens),
        **({} if tokens.divergence is None else _divergence_metrics(tokens.divergence)),
    } | {name: float(values.double().mean()) for name, values in stats.metrics.items()}


def _region_metrics(objective: Objective, tokens: Tokens) -> dict[str, float]:
    left = out_of_region(objective, tokens)
    if left is None:
        return {}
    sides = {"": left, "_low": left & (prob_diff(tokens) < 0), "_high": left & (prob_diff(tokens) > 0)}
    return {f"out_of_region{name}": float(side.double().mean()) for name, side in sides.items()}


def _divergence_metrics(divergence: Tensor) -> dict[str, float]:
    return {"divergence_mean": float(divergence.double().mean()), "divergence_p99": _p99(divergence)}


def _p99(values: Tensor) -> float:
    """The 99th percentile; torch's own refuses more than 2**24 numbers."""
    return float(np.quantile(values.double().numpy(), 0.99))


def _kept(stats: TokenStats) -> TokenStats:
    keep = stats.tokens.keep
    columns: dict[str, Any] = {name: None if v is None else v[keep] for name, v in vars(stats.tokens).items()}
    metrics = {name: v[keep] for name, v in stats.metrics.items()}
    return TokenStats(Tokens(**columns), stats.entropy[keep], stats.gradient[keep], metrics)


def step_metrics(
    step: int, groups: Sequence[ScoredGroup], stats: Sequence[StepStats], objective: Objective
) -> dict[str, object]:
    """Return one step's record: the rollout's figures, its tokens' over all updates, and each update's under "updates".

    Args:
        step: counted from 1.
        groups: of the rollout.
        stats: of its updates, in order.
        objective: what was trained with.
    """
    record: dict[str, object] = dict(rollout_metrics(step, groups))
    skipped = sum(not s.taken for s in stats)
    if skipped:
        record["skipped_updates"] = skipped
        stats = [s for s in stats if s.taken]
    if stats:
        starts = accumulate((int(s.tokens.sequence.max()) + 1 if len(s.entropy) else 0 for s in stats), initial=0)
        # Every update numbers its completions from 0.
        parts = [
            replace(s.token_stats, tokens=replace(s.tokens, sequence=s.tokens.sequence + n))
            for s, n in zip(stats, starts, strict=False)
        ]
        record |= token_metrics(objective, TokenStats.cat(parts)) | _update_metrics(stats[-1])
        record["grad_norm"] = max(s.grad_norm for s in stats)
        record["zero_grad_updates"] = sum(s.grad_norm == 0 for s in stats)
    if len(stats) > 1 or (stats and skipped):
        record["updates"] = [token_metrics(objective, s.token_stats) | _update_metrics(s) for s in stats]
    return record


def _update_metrics(stats: StepStats) -> dict[str, float]:
    return {"loss": stats.loss, "grad_norm": stats.grad_norm, "learning_rate": stats.learning_rate}


def metrics_by_turn(
    groups: Sequence[ScoredGroup], batches: Sequence[Batch], stats: Sequence[StepStats]
) -> dict[str, float]:
    """Return the figures of `BY_TURN_METRICS` for the first `MOST_TURNS` turns; none without environments or updates.

    Args:
        groups: of the rollout.
        batches: of its updates.
        stats: of these, in order.
    """
    turn_of = {s: turn for g in groups for e in g.episodes if e.played for s, turn in _turns_of(e)}
    taken = [(batch, s) for batch, s in zip(batches, stats, strict=True) if s.taken]
    if not turn_of or not taken:
        return {}
    columns = [_by_row(s) for _, s in taken]
    rows = [batch.credits[n].sequence for batch, s in taken for n in s.row.unique().tolist()]
    turn = torch.cat([torch.empty(0), *(turn_of[row] for row in rows)])
    moved, r = (torch.cat(column).double() for column in zip(*columns, strict=True))
    record = {}
    for number in range(1, MOST_TURNS + 1):
        of_turn = turn == number
        if of_turn.any():
            record[f"prob_diff_mean/turn_{number}"] = float(moved[of_turn].mean())
            record[f"ratio_mean/turn_{number}"] = float(r[of_turn].mean())
    return record


def _turns_of(episode: Episode) -> list[tuple[TokenSequence, Tensor]]:
    """Each of an episode's sequences, with the number of each sampled token's turn, from 1."""
    turns = torch.tensor(episode.turns)
    number = torch.arange(1, 1 + len(turns)).repeat_interleave(turns)
    parts = number.split([s.n_sampled for s in episode.sequences])
    return list(zip(episode.sequences, parts, strict=True))


def _by_row(stats: StepStats) -> tuple[Tensor, Tensor]:
    """|pi - mu| and pi / mu of an update's tokens, row after row."""
    order = stats.row.argsort(stable=True)
    return prob_diff(stats.tokens).abs()[order], ratio(stats.tokens)[order]


def filter_metrics(groups: Sequence[ScoredGroup]) -> dict[str, int]:
    """Return the counts of `FILTER_METRICS` that are not 0."""
    attempts = [g.all_episodes[0].attempt for g in groups if g.all_episodes]
    counts = {
        "overlong_masked": sum(len(g.masked) for g in groups),
        "overlong_punished": sum(result.parts.get(OVERLONG, 0) < 0 for g in groups for result in g.results),
        "resampled_groups": sum(attempt > 0 for attempt in attempts),
        "resampling_attempts": sum(attempts),
    }
    return {name: count for name, count in counts.items() if count}


def signal_metrics(groups: Sequence[ScoredGroup], credits: Sequence[Credit]) -> dict[str, float]:
    """Return the figures of `SIGNAL_METRICS`.

    Args:
        groups: of the rollout.
        credits: of the sequences that are trained, by the rewards.
    """
    pushed = {credit.sequence for credit in credits if bool(credit.advantage.any())}
    scored = [g for g in groups if len(g.rewards)]
    with_signal = sum(any(s in pushed for s in g.sequences) for g in scored)
    return {"groups_with_signal": with_signal / len(scored)}


def routing_metrics(batches: Sequence[Batch]) -> dict[str, int]:
    """Return what was not replayed of a step's batches; nothing where no experts are replayed."""
    told = [(m.routes, m.routing_conflicts) for batch in batches for m in batch.micro_batches if m.routes is not None]
    if not told:
        return {}
    return {
        "routing_missing": sum(int((~known(routes)).sum()) for routes, _ in told),
        "routing_conflicts": sum(conflicts for _, conflicts in told),
    }


def value_metrics(batches: Sequence[Batch], stats: Sequence[CriticStats]) -> dict[str, float]:
    """Return the figures of `VALUE_METRICS`; none where the critic had nothing to learn from.

    Args:
        batches: of a step.
        stats: of the critic's updates on them, in order.
    """
    if not stats:
        return {}
    credits = [credit for batch in batches for credit in batch.credits]
    value = torch.cat([c.value for c in credits if c.value is not None])
    record = {"value_mean": float(value.double().mean())}
    explained = explained_variance(value, torch.cat([c.returns for c in credits if c.returns is not None]))
    if explained is not None:
        record["explained_variance"] = explained
    taken = [s for s in stats if s.taken]
    if taken:
        record["value_loss"] = taken[-1].loss
        record["value_grad_norm"] = max(s.grad_norm for s in taken)
        n = sum(s.n_tokens for s in taken)
        record["value_clipped"] = sum(s.clipped for s in taken) / max(1, n)
    if len(taken) < len(stats):
        record["value_skipped"] = len(stats) - len(taken)
    return record
