"""Replays a recorded batch under several objectives: which tokens each would move, how far, and where they disagree.

Shapes: T sampled tokens of the sequences that the step trained on, in the order of the record. All results are about
the gradient with respect to logp. The change of logp after an optimiser step differs, because tokens share the model's
weights; the weights are not used here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.objectives import REGISTRY, Objective, Tokens, gradient, gradient_weight, needed_divergence, ratio
from drpo.spec import format_spec, parse_spec, runs_code
from drpo.train.chapters import read_chapters, value_at
from drpo.train.records import CONFIG, ROLLOUTS, read_json, read_records
from drpo.train.rollout_record import (
    sampled_ids,
    sampled_positions,
    sequences,
    token_advantages,
    token_scores,
    trained_rows,
    unit_numbers,
)

BUCKETS = (0.0, 0.001, 0.01, 0.1, 0.5, 1.0)
"""Edges of the buckets of mu; each includes its lower edge, the last its upper edge too."""

SHOWN = 8
"""The number of tokens kept per disagreement."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """The batch of one step of a run.

    Args:
        run: the run's folder.
        step: counted from 1.
        updates: number of the step's updates that have tokens.
        objective: the spec of the run's objective; None if its configuration does not name one.
        divergence: the recorded top-K divergence, or None.
        tokens: T tokens, float64; `logp` is from before each token's update.
        token_ids: [T] int64.
        place: [T] int64, position of each token in its row.
        row: [T] int64, the `TokenSequence` of each token: the completion, or a branch of an episode.
        completions: token ids of each row after its prompt, those of an environment too.
        problems: problem id of each row.
    """

    run: Path
    step: int
    updates: int
    objective: str | None
    divergence: str | None
    tokens: Tokens
    token_ids: Tensor
    place: Tensor
    row: Tensor
    completions: tuple[tuple[int, ...], ...]
    problems: tuple[str, ...]


def recorded(run: Path, step: int | None = None) -> Recorded:
    """Read one step's batch from a run's `rollouts.jsonl`.

    Sequences without `logp` are skipped: their gradient was 0 or their reward failed.

    Args:
        run: folder of a run.
        step: counted from 1; None is the last step with trained tokens.

    Raises:
        InputError: no run there, an unreadable record, no such step, or a step without trained tokens.
    """
    try:
        records = read_records(run / ROLLOUTS)
    except OSError as error:
        raise InputError(f"{run / ROLLOUTS} cannot be read: {error}") from None
    trained = [r for r in records if any("logp" in s for s in sequences(r))]
    if not trained:
        reason = f"none of its {len(records)} completions has logp" if records else f"{ROLLOUTS} is missing or empty"
        raise InputError(f"{run}: {reason}; name the folder of a run that has trained")
    steps = sorted({r["step"] for r in trained})
    if step is not None and step not in steps:
        known = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{steps[0]} alone"
        raise InputError(f"{run}: step={step} has no trained tokens; those that have: {known}")
    chosen = [r for r in trained if r["step"] == (steps[-1] if step is None else step)]
    spec, sequence = _objective_of(run, chosen[0]["step"])
    try:
        return batch_of(run, chosen, spec, sequence)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{run / ROLLOUTS}: a record of step {chosen[0]['step']} cannot be used: {error!r}") from None


def batch_of(run: Path, records: Sequence[Mapping[str, Any]], spec: str | None, sequence: str) -> Recorded:
    """Return the batch of some records.

    Args:
        run: where they come from.
        records: of `rollouts.jsonl`, all of one step; some have "logp".
        spec: of the objective that trained on them, if it is known.
        sequence: what that took as one sequence, "episode" or "turn".
    """
    trained = trained_rows(records, sequence)
    rows = [row.tokens for row in trained]

    def column(name: str) -> Tensor:
        return torch.tensor([x for s in rows for x in s[name]], dtype=torch.float64)

    advantage = torch.tensor([a for s in rows for a in token_advantages(s)], dtype=torch.float64)
    has = all("divergence" in s for s in rows)
    known = has and spec is not None and not runs_code(spec)  # code that a folder names is not imported
    scores = token_scores(trained)
    kind = needed_divergence(parse_spec(str(spec), REGISTRY).needs) if known else None
    return Recorded(
        run=run,
        step=records[0]["step"],
        updates=len({s["update"] for s in rows}),
        objective=spec,
        divergence=kind,
        tokens=Tokens(
            column("logp"),
            column("behavior_logp"),
            advantage,
            torch.ones_like(advantage, dtype=torch.bool),
            torch.tensor(unit_numbers(trained), dtype=torch.int64),
            column("divergence") if kind is not None else None,
            proximal_logp=column("proximal_logp") if all("proximal_logp" in s for s in rows) else None,
            reference_logp=column("reference_logp") if all("reference_logp" in s for s in rows) else None,
            score=None if scores is None else torch.tensor(scores, dtype=torch.float64),
        ),
        token_ids=torch.tensor([i for s in rows for i in sampled_ids(s)]),
        place=torch.tensor([i for s in rows for i in sampled_positions(s)]),
        row=torch.tensor([i for i, row in enumerate(trained) for _ in row.units]),
        completions=tuple(tuple(s["token_ids"]) for s in rows),
        problems=tuple(records[row.episode]["problem"] for row in trained),
    )


def _objective_of(run: Path, step: int) -> tuple[str | None, str]:
    """The spec of a run's objective at a step, and what it took as one sequence, as far as its configuration says."""
    try:
        objective = read_json(run / CONFIG).get("objective")
    except FileNotFoundError:
        return None, "episode"
    fields = objective if isinstance(objective, dict) else {}
    chapters = read_chapters(run)
    spec = value_at(chapters, "objective", step, fields.get("loss"))
    sequence = value_at(chapters, "sequence", step, fields.get("sequence"))
    return spec if isinstance(spec, str) else None, "turn" if sequence == "turn" else "episode"


@dataclass(frozen=True)
class Bucket:
    """The tokens with mu in one range.

    Args:
        low, high: of mu.
        tokens: share of the batch's tokens, in [0, 1].
        mass: share of the objective's gradient mass, the sum of |A r w|.
        step: mean of sign(A) (-d loss / d logp) over tokens with A not 0: the first-order change of logp in the
            direction of the advantage, for a learning rate of 1 and tokens that share no weights; 0 without such
            tokens.
    """

    low: float
    high: float
    tokens: float
    mass: float
    step: float


@dataclass(frozen=True)
class Reading:
    """The effect of one objective on the batch.

    Args:
        objective: its spec.
        mass: sum of |A r w| divided by the plain surrogate's sum of |A r|.
        buckets: by mu.
        silenced: share of tokens with w = 0 and A not 0.
        pulled_back: share of tokens with w < 0: moved against their advantage.
        weakened: share of tokens with 0 < w < 1.
        strengthened: share of tokens with w > 1.
        effective: effective sample size, (sum |r w|)^2 / sum (r w)^2, as a share of the tokens; 0 if all are silenced.
        largest: largest |r w|.
        rising, falling: mean first-order change of logp, -d loss / d logp, over tokens with A > 0 and with A < 0, for a
            learning rate of 1; 0 without such tokens.
    """

    objective: str
    mass: float
    buckets: tuple[Bucket, ...]
    silenced: float
    pulled_back: float
    weakened: float
    strengthened: float
    effective: float
    largest: float
    rising: float
    falling: float


@dataclass(frozen=True)
class Disputed:
    """A token that two objectives would move differently.

    Args:
        token: its index in the batch, 0 .. T-1.
        token_id: in the vocabulary.
        problem: problem id of its completion.
        place: position in its completion.
        mu, pi: probabilities.
        advantage: of its completion.
        first, second: first-order change of logp under each objective, -d loss / d logp.
    """

    token: int
    token_id: int
    problem: str
    place: int
    mu: float
    pi: float
    advantage: float
    first: float
    second: float


@dataclass(frozen=True)
class Dispute:
    """The tokens at which the first objective and another differ most.

    Args:
        first, second: their specs.
        cosine: between their gradients with respect to logp.
        tokens: largest differences first, without differences of rounding.
    """

    first: str
    second: str
    cosine: float
    tokens: tuple[Disputed, ...]


@dataclass(frozen=True)
class Replay:
    """The effects of several objectives on one batch.

    Args:
        run: the run's folder.
        step: counted from 1.
        updates: number of updates of the step.
        tokens: T.
        trained_with: the spec of the run's objective, or None.
        readings: one per objective, in the given order.
        cosines: between the gradients of each pair, [objectives][objectives]; 0 for a gradient of 0.
        disputes: of the first objective with each of the others.
    """

    run: str
    step: int
    updates: int
    tokens: int
    trained_with: str | None
    readings: tuple[Reading, ...]
    cosines: tuple[tuple[float, ...], ...]
    disputes: tuple[Dispute, ...]


def replay(batch: Recorded, objectives: Sequence[Objective]) -> Replay:
    """Compute the effect of every objective on the same tokens.

    Args:
        batch: from `recorded`.
        objectives: at least one.

    Raises:
        InputError: no objectives, or one requires a divergence that the run did not record.
    """
    if not objectives:
        raise InputError("objectives: name at least one, such as 'drpo(0.2)'")
    for objective in objectives:
        needed = needed_divergence(objective.needs)
        if needed not in (None, batch.divergence):
            has = "no divergence" if batch.divergence is None else batch.divergence
            raise InputError(
                f"objective {format_spec(objective, REGISTRY)} reads {needed}, but {batch.run} recorded {has}: leave "
                "it out, or replay a run that was trained with it"
            )
    slopes = torch.stack([gradient(o, batch.tokens) for o in objectives])
    sizes = slopes.norm(dim=1)
    cosines = (slopes @ slopes.T) / (sizes[:, None] * sizes).clamp(min=torch.finfo(torch.float64).tiny)
    names = [format_spec(o, REGISTRY) for o in objectives]
    return Replay(
        run=str(batch.run),
        step=batch.step,
        updates=batch.updates,
        tokens=len(batch.token_ids),
        trained_with=batch.objective,
        readings=tuple(reading(o, batch.tokens) for o in objectives),
        cosines=tuple(tuple(row) for row in cosines.clamp(-1, 1).tolist()),
        disputes=tuple(
            Dispute(names[0], name, float(cosines[0, i]), disputed(batch, slopes[0], slopes[i]))
            for i, name in enumerate(names)
            if i > 0
        ),
    )


def reading(objective: Objective, tokens: Tokens) -> Reading:
    """Return the effect of an objective on tokens, at least one.

    Example:
        >>> from drpo.objectives import DRPO
        >>> pi, mu = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 0.9], [0.4, 0.4]))
        >>> both, a = torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.float64)
        >>> result = reading(DRPO(0.2), Tokens(pi.log(), mu.log(), a, both, torch.arange(2)))
        >>> result.weakened, result.pulled_back  # w = 0.5 and -1.5
        (0.5, 0.5)
    """
    slope, w, r = gradient(objective, tokens), gradient_weight(objective, tokens), ratio(tokens)
    scaled, plain, a = (r * w).abs(), (tokens.advantage * r).abs(), tokens.advantage
    rounding = 1e-9  # r w / r is 1 up to rounding
    total = float(slope.abs().sum())

    def share(which: Tensor) -> float:
        return float(which.double().mean())

    squares = float(scaled.square().sum())
    return Reading(
        objective=format_spec(objective, REGISTRY),
        mass=total / float(plain.sum()) if bool(plain.any()) else 0.0,
        buckets=tuple(_bucket(tokens, slope, low, high) for low, high in pairwise(BUCKETS)),
        silenced=share((w == 0) & (a != 0)),
        pulled_back=share(w < 0),
        weakened=share((w > 0) & (w < 1 - rounding)),
        strengthened=share(w > 1 + rounding),
        effective=float(scaled.sum()) ** 2 / squares / len(w) if squares > 0 else 0.0,
        largest=float(scaled.max()),
        rising=_mean(-slope[a > 0]),
        falling=_mean(-slope[a < 0]),
    )


def _bucket(tokens: Tokens, slope: Tensor, low: float, high: float) -> Bucket:
    mu = tokens.behavior_logp.exp()
    mine = (mu >= low) & ((mu < high) | (high == BUCKETS[-1]))
    total = float(slope.abs().sum())
    with_advantage = mine & (tokens.advantage != 0)
    return Bucket(
        low,
        high,
        tokens=float(mine.double().mean()),
        mass=float(slope[mine].abs().sum()) / total if total > 0 else 0.0,
        step=_mean((-slope * tokens.advantage.sign())[with_advantage]),
    )


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def disputed(batch: Recorded, first: Tensor, second: Tensor) -> tuple[Disputed, ...]:
    """Return the tokens at which two gradients [T] differ most."""
    apart = (first - second).abs()
    order = apart.argsort(descending=True, stable=True)[:SHOWN]
    noise = 1e-9 * max(float(first.abs().max()), float(second.abs().max()))
    t = batch.tokens
    return tuple(
        Disputed(
            token=i,
            token_id=int(batch.token_ids[i]),
            problem=batch.problems[int(batch.row[i])],
            place=int(batch.place[i]),
            mu=float(t.behavior_logp[i].exp()),
            pi=float(t.logp[i].exp()),
            advantage=float(t.advantage[i]),
            first=float(-first[i]),
            second=float(-second[i]),
        )
        for i in order.tolist()
        if apart[i] > noise
    )


def context(batch: Recorded, token: int, before: int = 12) -> tuple[tuple[int, ...], int]:
    """Return the ids of up to `before` tokens that precede a token in its completion, and the token's id."""
    ids = batch.completions[int(batch.row[token])]
    place = int(batch.place[token])
    return ids[max(0, place - before) : place], ids[place]
