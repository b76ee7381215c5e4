"""Computes all exact problems, and compares the results with the theory."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from drpo.objectives import REGISTRY, Objective
from drpo.spec import parse_spec
from exact.agreement import Agreement, agreement, mistaken
from exact.claims import (
    FixedPoint,
    Joint,
    Penalty,
    Region,
    Stop,
    fixed_points,
    joint_fixed_point,
    penalties,
    same_region,
    stops,
)
from exact.drift import UNBIASED, Drift, drift
from exact.long_tail import (
    Learnt,
    Noise,
    Staleness,
    best_word,
    learning,
    meaningful_tail,
    memorising,
    noise,
    noisy_tail,
    staleness,
)
from exact.variance import Variance, variances

PANEL = (
    "none",
    "tis(2)",
    "ppo(0.2, 0.28)",
    "cispo(0.2, 0.28)",
    "sapo(1, 1.05)",
    "dppo(0.15)",
    "mask(0.15)",
    "spo(0.2)",
    "drpo(0.2, power=0.5)",
    "drpo(0.2)",
    "drpo(12.5)",
    "penalty('k3', 0.5)",
    "penalty('k1', 0.1)",
)
"""The objectives that are compared; the first is the unregularised surrogate."""

SAMPLED = ("none", "ppo(0.2, 0.28)", "spo(0.2)", "dppo(0.05, divergence='topk_kl')", "drpo(0.2)", "gspo(0.2, 0.28)")
"""Objectives whose exact gradients are compared with a million draws."""

LEARNERS = (
    "none",
    "ppo(0.2, 0.28)",
    "cispo(0.2, 0.28)",
    "dppo(0.15)",
    "spo(0.2)",
    "spo(3)",
    "drpo(0.2, power=0.5)",
    "drpo(0.2)",
    "drpo(0.02)",
)
"""Objectives that are trained on the long-tailed problems."""

STALE = ("none", "ppo(0.2, 0.28)", "cispo(0.2, 0.28)", "dppo(0.15)", "spo(0.2)", "drpo(0.2)")
"""Objectives that are also trained on the noisy tail with fewer updates per rollout."""

EXPONENTS: dict[str, tuple[float | None, float | None]] = {
    "none": (-1, -1),
    "tis(2)": (1, 1),
    "ppo(0.2, 0.28)": (None, -1),
    "cispo": (1, 1),
    "sapo": (None, None),
    "dppo(0.15, 0.15)": (1, 1),
    "mask(0.15)": (-1, -1),
    "spo(0.2)": (-3, -3),
    "drpo(0.2, 0.5)": (-2, -2),
    "drpo(0.2)": (-1, -1),
    "drpo(12.5)": (-1, -1),
}
"""What mu (r w)^2 gives at a fixed shift of 0.1, A > 0 and A < 0, with r ~ 1/mu; None: silenced."""


@dataclass(frozen=True)
class Check:
    """A claim of the theory, and the computed result.

    Args:
        name: in a few words.
        theory: what should be.
        found: what is.
        agrees: whether they do.
    """

    name: str
    theory: str
    found: str
    agrees: bool


@dataclass(frozen=True)
class Theory:
    """All results; `examine` says which function computes which field."""

    agreement: tuple[Agreement, ...]
    mistaken: float
    fixed_points: tuple[FixedPoint, ...]
    stops: tuple[Stop, ...]
    joint: Joint
    region: Region
    penalties: tuple[Penalty, ...]
    variances: tuple[Variance, ...]
    drift: tuple[Drift, ...]
    noisy: tuple[Learnt, ...]
    meaningful: tuple[Learnt, ...]
    noisy_staleness: tuple[Staleness, ...]
    noisy_noise: tuple[Noise, ...]
    meaningful_noise: tuple[Noise, ...]


def examine(watched: Callable[[Collection[str]], Iterable[str]] = iter) -> Theory:
    """Compute all results; about twenty seconds on one core.

    Args:
        watched: receives the names of the parts and yields each when it begins, as a progress bar does.
    """
    panel, learners = parsed(PANEL), parsed(LEARNERS)
    noisy, meaningful = noisy_tail(), meaningful_tail()
    switches = [(parse_spec("ppo(0.2, 0.28)", REGISTRY), 0.64), (parse_spec("dppo(0.15)", REGISTRY), 0.65)]
    parts: dict[str, Callable[[], Any]] = {
        "agreement": lambda: agreement(parsed(SAMPLED)),
        "mistaken": mistaken,
        "fixed_points": fixed_points,
        "stops": lambda: stops(switches),
        "joint": joint_fixed_point,
        "region": same_region,
        "penalties": penalties,
        "variances": lambda: variances(panel),
        "drift": lambda: drift(panel),
        "noisy": lambda: learning(learners, noisy),
        "meaningful": lambda: learning(learners, meaningful),
        "noisy_staleness": lambda: staleness(parsed(STALE), noisy, (2, 4, 8)),
        "noisy_noise": lambda: noise(learners, noisy, memorising(noisy), (0.0, 0.1, 0.3)),
        "meaningful_noise": lambda: noise(learners, meaningful, best_word(meaningful), (0.0, 0.003, 0.05, 0.2)),
    }
    return Theory(**{name: parts[name]() for name in watched(parts)})


def parsed(texts: Sequence[str]) -> tuple[Objective, ...]:
    """Return the objectives of these specs."""
    return tuple(parse_spec(text, REGISTRY) for text in texts)


def checks(theory: Theory) -> tuple[Check, ...]:
    """Return every claim of the theory with the computed result."""
    parts = (_of_the_values, _of_one_token, _of_the_variance, _of_the_bias, _of_the_tail)
    return tuple(check for part in parts for check in part(theory))


def _of_the_values(theory: Theory) -> tuple[Check, ...]:
    autograd = max(a.autograd for a in theory.agreement)
    z, lost = max(a.z for a in theory.agreement), theory.mistaken > 20
    return (
        Check("exact = automatic gradient", "the same, to rounding", f"apart by {autograd:.0e}", autograd < 1e-10),
        Check("exact = sampled gradient", "within error bars", f"largest |z| {z:.1f}", z < 5),
        Check("a wrong estimator shows", "many standard errors", f"ratio forgotten: {theory.mistaken:.0f}", lost),
    )


def _of_one_token(theory: Theory) -> tuple[Check, ...]:
    rows = []
    for name, formula in (
        ("drpo(0.2)", "pi* = mu + sign(A) delta"),
        ("drpo(0.2, 0.5)", "pi* = mu + sign(A) delta mu^(1/2)"),
        ("spo(0.5)", "pi* = mu (1 + sign(A) epsilon)"),
    ):
        errors = [p.error for p in theory.fixed_points if p.objective == name]
        found = f"from both sides, {len(errors)} cases, apart by {max(errors):.0e}"
        rows.append(Check(f"fixed point of {name}", formula, found, max(errors) < 1e-9))
    for stop in theory.stops:
        holds = 0 <= stop.inside - stop.boundary < 1e-3 and abs(stop.outside - 0.95) < 1e-9
        found = f"stops at {stop.inside:.3f}; put at 0.95, it ends at {stop.outside:.2f}"
        rows.append(Check(f"{stop.objective} holds", f"stops at {stop.boundary:g}, never returns", found, holds))
    joint, region = theory.joint, theory.region
    found = f"apart by {joint.error:.0e}; from mu + sign(A) delta by {joint.away:.3f}"
    rows.append(
        Check("fixed point of a whole distribution", "mu + delta (sign(A) - lambda/|A|)", found, joint.error < 1e-6)
    )
    found = f"{region.disagreements} of {region.cases:,} otherwise ({region.outside:,} outside)"
    rows.append(Check("DRPO turns where DPPO masks", "the same set", found, region.disagreements == 0))
    for penalty in theory.penalties:
        what = penalty.divergence.replace("_", " ")
        found = f"{penalty.penalty:.4g} and {penalty.exact:.4g}; relative error {penalty.error:.0e}"
        rows.append(Check(f"penalty of {penalty.objective}", what, found, penalty.error < 1e-10))
    return tuple(rows)


def _of_the_variance(theory: Theory) -> tuple[Check, ...]:
    rows = []
    for column, case in enumerate(("shift 0.1, A > 0", "shift 0.1, A < 0")):
        found = {v.objective: v.exponent for v in theory.variances if v.case == case}
        wrong = [name for name, wanted in EXPONENTS.items() if not _same(found[name], wanted[column])]
        said = f"otherwise for {', '.join(wrong)}" if wrong else f"all {len(EXPONENTS)} within 0.01"
        rows.append(Check(f"variance, {case}", "exponents of mu (r w)^2", said, not wrong))
    ratios = [v.exponent for v in theory.variances if v.case == "ratio 1.1, A > 0" and v.exponent is not None]
    worst = max(abs(k - 1) for k in ratios)
    rows.append(
        Check("variance, ratio 1.1", "mu^1 for all: no difference", f"all within {worst:.0e} of 1", worst < 0.01)
    )
    return tuple(rows)


def _same(fitted: float | None, wanted: float | None) -> bool:
    return fitted is wanted if fitted is None or wanted is None else abs(fitted - wanted) < 0.01


def _of_the_bias(theory: Theory) -> tuple[Check, ...]:
    found = {d.objective: d for d in theory.drift}
    biased = [name for name, d in found.items() if d.onset is None]
    plain = max(found["none"].relative)
    smooth = {name: found[name].order or 0.0 for name in ("drpo(0.2)", "drpo(0.2, 0.5)", "spo(0.2)", "sapo")}
    orders = ", ".join(f"{name} {order:.2f}" for name, order in smooth.items())
    right = all(abs(order - (2 if name == "sapo" else 1)) < 0.01 for name, order in smooth.items())
    switched = {name: found[name] for name in ("ppo(0.2, 0.28)", "tis(2)", "cispo", "dppo(0.15, 0.15)")}
    onsets = ", ".join(f"{name} {d.onset:g}" for name, d in switched.items() if d.onset is not None)
    sharp = all(d.onset and max(d.relative) > UNBIASED for d in switched.values())
    return (
        Check(
            "bias at pi = mu",
            "none, but for k1's",
            f"biased: {', '.join(biased) or 'none'}",
            biased == [name for name in found if "k1" in name],
        ),
        Check("bias of the plain surrogate", "0 at any drift", f"at most {plain:.0e}", plain < UNBIASED),
        Check("bias grows smoothly", "as tv (quadratic), tv^2 (sapo)", f"exponents: {orders}", right),
        Check("bias begins at a boundary", "exactly 0 up to some drift", f"unbiased up to tv: {onsets}", sharp),
    )


def _of_the_tail(theory: Theory) -> tuple[Check, ...]:
    last = {found.objective: found.value[-1] for found in theory.noisy}
    by_ratio, by_shift = ("ppo(0.2, 0.28)", "spo(0.2)"), ("dppo(0.15, 0.15)", "drpo(0.2)")
    kept = min(last[name] for name in by_ratio) > max(last[name] for name in by_shift)
    noisy = ", ".join(f"{name} {last[name]:.3f}" for name in by_ratio + by_shift)
    reached = {found.objective: found.reached(0.9) for found in theory.meaningful}
    never = len(theory.meaningful[0].value)
    first = {name: never if at is None else at for name, at in reached.items()}
    soon = max(first[name] for name in by_shift) < min(first[name] for name in by_ratio)
    rounds = ", ".join(f"{name} {'never' if reached[name] is None else reached[name]}" for name in by_shift + by_ratio)
    few = {found.objective: found.value[-1] for found in theory.noisy_staleness[1].learnt}
    fresh = min(few[name] for name in by_shift) > max(few[name] for name in by_ratio)
    said = ", ".join(f"{name} {few[name]:.3f}" for name in by_ratio + by_shift)
    return (
        Check("a tail of noise, 4 updates a rollout", "the looser region learns faster", f"at the end: {said}", fresh),
        Check("a tail of noise, 16 updates", "a tight ratio protects, a shift does not", f"at the end: {noisy}", kept),
        Check("a rare best word", "a tight ratio starves it, a shift does not", f"rounds to 0.9: {rounds}", soon),
    )
