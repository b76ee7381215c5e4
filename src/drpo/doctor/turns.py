"""Checks of episodes of several turns: that tokens are trained as they were sampled, with log-probabilities as good
in the last turn as in the first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.batch import pack
from drpo.doctor.distribution import K3_BROKEN, SIGMAS
from drpo.doctor.finding import Finding, judge
from drpo.doctor.probe_batch import by_completion
from drpo.doctor.recording import Sampled
from drpo.model.policy import Policy
from drpo.types import Episode, MicroBatch

MOST_EPISODES = 16
"""Episodes whose log-probabilities are computed: those with the most turns."""


def turn_tokens(episodes: Sequence[Episode], sampled: Sequence[Sequence[Sampled]]) -> Finding:
    """Whether each turn is trained once, as the ids that were sampled, behind the ids that the engine read.

    Args:
        episodes: of several turns, where there are any.
        sampled: the turns of each, as the engine sampled them.
    """
    faults = [fault for e, turns in zip(episodes, sampled, strict=True) for fault in _faults(e, turns)]
    n_turns = sum(len(e.turns) for e in episodes)
    n_sampled = sum(e.n_sampled for e in episodes)
    inserted = sum(len(s.token_ids) - s.n_sampled for e in episodes for s in e.sequences)
    branches = sum(max(0, len(e.sequences) - 1) for e in episodes)
    verdict, advice = judge(not faults, faults[0] if faults else "")
    return Finding(
        "turn tokens",
        verdict,
        f"{n_sampled} ids of {n_turns} turns are trained as they were sampled, {inserted} between them are not; "
        f"{branches} branches, else every prompt begins with the one before"
        if not faults
        else f"{len(faults)} faults in {n_turns} turns",
        "every sampled id trained once, and no other",
        advice,
        {"turns": n_turns, "sampled": n_sampled, "inserted": inserted, "branches": branches, "faults": len(faults)},
    )


def _faults(episode: Episode, turns: Sequence[Sampled]) -> list[str]:
    """What is wrong with an episode's ids, mask and log-probabilities."""
    who = f"episode {episode.sample} of problem {episode.problem_id!r}"
    rows = [_Row.of(s.prompt_ids, s.token_ids, s.sampled, s.behavior_logp) for s in episode.sequences]
    row = 0
    for number, turn in enumerate(turns, 1):
        while row + 1 < len(rows) and rows[row].is_over:
            row += 1
        fault = rows[row].take(turn) if rows else "its turns are not trained"
        if fault:
            return [f"{who}, turn {number}: {fault}"]
    over = all(r.is_over for r in rows)
    return [] if over else [f"{who}: tokens are trained that the model did not sample"]


class _Row:
    """A sequence of ids of an episode, of which turns are taken one after the other."""

    def __init__(self, ids: Tensor, sampled: Tensor, behavior_logp: Tensor) -> None:
        self._ids, self._left, self._logp = ids, sampled, behavior_logp
        self._read = torch.empty(0, dtype=ids.dtype)

    @staticmethod
    def of(prompt: Tensor, token_ids: Tensor, sampled: Tensor, behavior_logp: Tensor) -> "_Row":
        mask = torch.cat([torch.zeros_like(prompt, dtype=torch.bool), sampled])
        return _Row(torch.cat([prompt, token_ids]), mask, behavior_logp)

    @property
    def is_over(self) -> bool:
        """Whether every token that is said to be sampled was found in a turn."""
        return not bool(self._left.any())

    def take(self, turn: Sampled) -> str:
        """Look for a turn's ids behind its prompt; return what is wrong, or ""."""
        prompt, ids = turn.request.prompt_ids.cpu(), turn.generation.token_ids.cpu()
        start, end = len(prompt), len(prompt) + len(ids)
        if not torch.equal(prompt[: len(self._read)], self._read):
            return "its prompt does not begin with the prompt and the turn before"
        if not torch.equal(self._ids[:start], prompt):
            return "it is trained after other ids than the engine read: a turn was encoded again"
        if not torch.equal(self._ids[start:end], ids):
            return "the ids that are trained are not those that were sampled"
        if bool(self._left[:start].any()):
            return "tokens before it are trained that the model did not sample"
        if not bool(self._left[start:end].all()):
            return "sampled tokens are left out of training"
        if not torch.equal(self._logp[: len(ids)], turn.generation.behavior_logp.cpu()):
            return "its log-probabilities are not those that the engine reported"
        self._left = self._left.clone()
        self._left[start:end] = False
        self._logp, self._read = self._logp[len(ids) :], self._ids[:end]
        return ""


@dataclass(frozen=True)
class _TurnFigures:
    """Tokens of all turns of one number: their count, mean pi/mu, its standard error, k3, mean |log pi/mu|."""

    tokens: int
    ratio: float
    error: float
    k3: float
    gap: float

    @staticmethod
    def of(log_ratio: Tensor) -> "_TurnFigures":
        x = log_ratio.double()
        r, n = x.exp(), len(x)
        error = float(r.std(correction=0)) / math.sqrt(n)
        return _TurnFigures(n, float(r.mean()), error, float((r - 1 - x).mean()), float(x.abs().mean()))

    @property
    def fine(self) -> bool:
        """Whether the ratio is 1 up to rounding and chance."""
        return abs(self.ratio - 1) <= 0.02 + SIGMAS * self.error and self.k3 <= K3_BROKEN


@torch.no_grad()
def turns(policy: Policy, episodes: Sequence[Episode]) -> Finding:
    """Whether pi / mu is 1 in the last turn as in the first, by the trainer's packing, with equal weights.

    Args:
        policy: the model in training, at the sampling temperature.
        episodes: sampled with its weights; some may have one turn.
    """
    most = max((len(e.turns) for e in episodes), default=0)
    if most < 2:
        return _one_turn_only(episodes)
    chosen = sorted(episodes, key=lambda e: -len(e.turns))[:MOST_EPISODES]
    by_turn: list[list[Tensor]] = [[] for _ in range(most)]
    for e, log_ratio in zip(chosen, log_ratios(policy, chosen), strict=True):
        for turn, part in enumerate(log_ratio.split(list(e.turns))):
            by_turn[turn].append(part)
    figures = [_TurnFigures.of(torch.cat(parts)) for parts in by_turn]
    first, last = figures[0], figures[-1]
    worst = next((i for i, f in enumerate(figures) if not f.fine or f.gap > 3 * first.gap + 0.1), None)
    verdict, advice = judge(worst is None, _advice(worst))
    return Finding(
        "turns",
        verdict,
        f"mean pi/mu {first.ratio:.4f} in turn 1, {last.ratio:.4f} in turn {most}; "
        f"mean |log mu - log p| {first.gap:.4f} and {last.gap:.4f}, of {len(chosen)} episodes",
        f"1 +- 0.02 in every turn, and |log mu - log p| at most {3 * first.gap + 0.1:.2f}",
        advice,
        {
            f"{name}_turn_{i}": value
            for i, f in enumerate(figures, 1)
            for name, value in (("ratio", f.ratio), ("k3", f.k3), ("gap", f.gap), ("tokens", f.tokens))
        },
    )


def _one_turn_only(episodes: Sequence[Episode]) -> Finding:
    cut = sum(e.finish_reason == "length" for e in episodes)
    return Finding(
        "turns",
        "note",
        f"none of {len(episodes)} episodes came to a second turn; {cut} were cut at max_new_tokens",
        "episodes of two turns or more",
        "an untrained model may never end a turn; a larger --sampling.max-new-tokens, or examples in the prompt, help",
        {"episodes": len(episodes), "truncated": cut},
    )


def _advice(worst: int | None) -> str:
    if not worst:
        return "the sampler's log-probabilities are not the trainer's; the line ratio says more"
    return (
        f"from turn {worst + 1} on the trainer reads other ids than the sampler, or the engine keeps keys and values "
        "of another conversation: see turn tokens"
    )


def log_ratios(policy: Policy, episodes: Sequence[Episode]) -> list[Tensor]:
    """Return log pi - log mu of each episode's sampled tokens, turn after turn, computed as in training."""
    sequences = [s for e in episodes for s in e.sequences]
    batch = pack(sequences, micro_batch_tokens=4096, share_prompts=policy.shares_prompts)
    micros: list[MicroBatch] = [m.to(policy.device) for m in batch.micro_batches]
    logp = by_completion(micros, [policy(m)[0].float() for m in micros])
    gaps = iter([a - s.behavior_logp for a, s in zip(logp, sequences, strict=True)])
    return [torch.cat([next(gaps) for _ in e.sequences]) for e in episodes]
