"""What several objectives would have done with a recorded batch: tables and a figure."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drpo.files import save_figure
from drpo.lab.replay import Bucket, Dispute, Recorded, Replay, context
from drpo.objectives import REGISTRY, Objective, gradient_weight, prob_diff
from drpo.report.figures import COLORS
from drpo.spec import format_spec
from drpo.terminal import Sheet

matplotlib.rcdefaults()  # not those of a matplotlibrc in the working folder
matplotlib.use("Agg")

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""


def replay_sheets(found: Replay, batch: Recorded, decode: Decode | None) -> tuple[Sheet, ...]:
    """Return the tables of a replay.

    Args:
        found: the replay.
        batch: what was replayed.
        decode: shows tokens as text; None shows their ids.
    """
    return (_effects(found), _buckets(found), _cosines(found), *(_dispute(d, batch, decode) for d in found.disputes))


def _effects(found: Replay) -> Sheet:
    shares = ("silenced", "pulled back", "weakened", "strengthened", "ESS")
    head = ("objective", "mass", *shares, "max|r w|", "A > 0", "A < 0")
    rows = tuple(
        (
            r.objective,
            f"{r.mass:.3f}",
            *(f"{share:.1%}" for share in (r.silenced, r.pulled_back, r.weakened, r.strengthened, r.effective)),
            f"{r.largest:.3g}",
            f"{r.rising:+.3f}",
            f"{r.falling:+.3f}",
        )
        for r in found.readings
    )
    title = (
        "Who moves how much: gradient mass beside the plain surrogate's, shares of tokens, first-order change of logp"
    )
    return Sheet(title, head, rows)


def _range(bucket: Bucket) -> str:
    return f"mu < {bucket.high:g}" if bucket.low == 0 else f"{bucket.low:g} to {bucket.high:g}"


def _buckets(found: Replay) -> Sheet:
    first = found.readings[0].buckets
    rows = [("share of tokens", *(f"{b.tokens:.1%}" for b in first))]
    rows += [(r.objective, *(f"{b.mass:.1%}" for b in r.buckets)) for r in found.readings]
    return Sheet("Share of the gradient mass |A r w|, by mu", ("objective", *(_range(b) for b in first)), tuple(rows))


def _cosines(found: Replay) -> Sheet:
    names = tuple(r.objective for r in found.readings)
    rows = tuple((n, *(f"{c:.3f}" for c in row)) for n, row in zip(names, found.cosines, strict=True))
    return Sheet("Cosine between gradients in logp", ("", *names), rows)


def _dispute(dispute: Dispute, batch: Recorded, decode: Decode | None) -> Sheet:
    rows = tuple(
        (
            _text(batch, t.token, decode),
            f"{t.mu:.4f}",
            f"{t.pi:.4f}",
            f"{t.advantage:+.3f}",
            f"{t.first:+.3f}",
            f"{t.second:+.3f}",
        )
        for t in dispute.tokens
    )
    head = ("token", "mu", "pi", "A", dispute.first, dispute.second)
    same = "" if rows else ": nowhere"
    return Sheet(f"Where {dispute.first} and {dispute.second} differ most (change of logp asked){same}", head, rows)


def _text(batch: Recorded, token: int, decode: Decode | None) -> str:
    before, own = context(batch, token)
    if decode is None:
        return f"id {own}"
    return f"{decode(before)[-24:]!r} [{decode((own,))!r}]"


def draw_replay(found: Replay, batch: Recorded, objectives: Sequence[Objective], path: Path) -> None:
    """Draw gradient mass by mu, and every token's weight over pi - mu."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_mass(left, found)
    moved = (prob_diff(batch.tokens) * batch.tokens.advantage.sign()).numpy()
    for i, objective in enumerate(objectives):
        w = gradient_weight(objective, batch.tokens).clamp(-3, 4)
        at = torch.arange(len(w))[:: max(1, len(w) // 4000)].numpy()
        label = format_spec(objective, REGISTRY)
        right.plot(moved[at], w.numpy()[at], ".", markersize=3, alpha=0.5, color=COLORS[i % 7], label=label)
    right.axhline(0, color="0.6", linewidth=0.7)
    right.set(xlabel="sign(A) (pi - mu): how far the advantage's way", ylabel="gradient weight w, cut to [-3, 4]")
    right.grid(alpha=0.25)
    right.legend(fontsize=8, markerscale=3)
    figure.suptitle(f"{found.run}, step {found.step}: {found.tokens:,} tokens")
    save_figure(figure, path)


def _draw_mass(axes: Axes, found: Replay) -> None:
    names = [r.objective for r in found.readings]
    base = [0.0] * len(names)
    for i, bucket in enumerate(found.readings[0].buckets):
        masses = [r.mass * r.buckets[i].mass for r in found.readings]
        axes.barh(names, masses, left=base, color=COLORS[i % 7], label=_range(bucket))
        base = [b + m for b, m in zip(base, masses, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="gradient mass (1: the plain surrogate's)", title="Whom the gradient goes to, by mu")
    axes.legend(fontsize=8)
