"""Computes all exact problems, and compares the results with the theory."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from drpo.objectives import REGISTRY, Objective, reads_batch
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
from exact.fates import Fate, fates
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
from exact.parting import Parting, even_pair, part, partings
from exact.texts import OfTexts, texts_bias
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

PANEL_2026 = (
    "reinforce",
    "reinforce + 0.1*k2",
    "ipo(0.3)",
    "icepop(0.5, 5)",
    "kpop(0.1)",
    "cppo(0.2)",
    "vespo",
    "gmpo(0.4, 0.4)",
    "m2po(0.04)",
    "m2po_areal(0.04)",
    "topr",
    "drpo_eff(0.2)",
    "clip_cov(fraction=1, cov_low=0.3)",
    "kl_cov(0.1, 0.1)",
    "mask(0.15) + 0.002*k2",
    "ppo(0.2, 0.28, max_ratio=1e4)",
    "ppo(0.2, 0.28)*opsm(0.1)",
    "none*reject('token_k3', 0.05)",
    "reinforce*weight('sequence', 2)",
    "ppo(0.2, 0.28)*proximal*weight('token', 5)",
    "ppo(0.2, 0.28)*proximal*weight('token', 5)*binary_kl(0.1)",
    "ppo(0.2, 0.28)*proximal*second_moment(0.04)",
    "vespo(max_ratio=3)",
)
"""The objectives of 2026, factors and decoupled ones."""

PANEL_OF_TEXTS = (
    *("none", "drpo(0.2)", "ppo(0.2, 0.28)", "gspo(0.2, 0.28)", "reinforce*weight('sequence', 1e6)"),
    *("none*band(0.8, 1.25, 'geometric')", "none*reject('seq_max_k3', 0.05)", "topr(over='sequence')"),
    *PANEL_2026,
)
"""What is compared on texts of three words."""

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

EXPONENTS_2026: dict[str, tuple[float | None, float | None]] = {
    "reinforce": (1, 1),
    "ipo": (1, 1),
    "icepop": (None, None),
    "kpop": (None, None),
    "cppo": (-1, -1),
    "vespo": (None, None),
    "gmpo": (None, -1),
    "topr": (1, 1),
    "drpo_eff(0.2)": (1, 1),
    "mask(0.15) + 0.002*k2": (-1, -1),
    "ppo(0.2, 0.28, max_ratio=10000.0)": (None, 1),
    "ppo(0.2, 0.28)*opsm(0.1)": (None, -1),
    "ppo(0.2, 0.28)*proximal*weight('token', 5)": (None, 0),
    "none*reject('token_k3', 0.05)": (None, None),
}
"""The same of those of 2026 that read no statistics of the batch; caps of 1e4 count, for r is beyond them."""


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
    variances_2026: tuple[Variance, ...]
    drift_2026: tuple[Drift, ...]
    fates: tuple[Fate, ...]
    texts: tuple[OfTexts, ...]
    partings: tuple[Parting, ...]
    tightest: Parting
    noisy: tuple[Learnt, ...]
    meaningful: tuple[Learnt, ...]
    noisy_staleness: tuple[Staleness, ...]
    noisy_noise: tuple[Noise, ...]
    meaningful_noise: tuple[Noise, ...]


def examine(watched: Callable[[Collection[str]], Iterable[str]] = iter) -> Theory:
    """Compute all results; about a minute on one core.

    Args:
        watched: receives the names of the parts and yields each when it begins, as a progress bar does.
    """
    panel, new, learners = parsed(PANEL), parsed(PANEL_2026), parsed(LEARNERS)
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
        "variances_2026": lambda: variances([o for o in new if not reads_batch(o)]),
        "drift_2026": lambda: drift(new),
        "fates": fates,
        "texts": lambda: texts_bias(parsed(PANEL_OF_TEXTS)),
        "partings": partings,
        "tightest": lambda: part(even_pair(), even_pair().behavior_logp, 0.2, 1e-3, 2, 0),
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
    parts = (
        _of_the_values,
        _of_one_token,
        _of_the_variance,
        _of_the_bias,
        _of_2026,
        _of_texts,
        _of_parting,
        _of_the_tail,
    )
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


def _of_2026(theory: Theory) -> tuple[Check, ...]:
    worst = max(f.error for f in theory.fates)
    inside = [f for f in theory.fates if any(0 < p < 1 for p in f.predicted)]
    back = [f.objective for f in inside if f.comes_back]
    pulls = [f.objective for f in inside if any(name in f.objective for name in ("k2", "drpo", "kl_cov"))]
    rows = [
        Check(
            "a lone token's end, objectives of 2026",
            "the formulas",
            f"{len(theory.fates)}, apart by {worst:.0e}",
            worst < 1e-9,
        ),
        Check("who brings a token back", "pulls, not masks or clips", ", ".join(back), back == pulls),
    ]
    for column, case in enumerate(("shift 0.1, A > 0", "shift 0.1, A < 0")):
        found = {v.objective: v.exponent for v in theory.variances_2026 if v.case == case}
        wrong = [name for name, wanted in EXPONENTS_2026.items() if not _same(found[name], wanted[column])]
        said = f"otherwise for {', '.join(wrong)}" if wrong else f"all {len(EXPONENTS_2026)} within 0.01"
        rows.append(Check(f"variance of 2026, {case}", "exponents of mu (r w)^2", said, not wrong))
    drifts = {d.objective: d for d in theory.drift_2026}
    biased = [name for name, d in drifts.items() if d.onset is None]
    smooth = [name for name, d in drifts.items() if d.order is not None]
    right = all(abs((drifts[name].order or 0) - 1) < 0.01 for name in smooth)
    said = f"{len(smooth)} grow as tv; biased there: {', '.join(biased)}"
    covariance = biased and all("cov" in name for name in biased)
    rows.append(Check("bias of 2026 at pi = mu", "none but the covariance terms", said, bool(covariance) and right))
    return tuple(rows)


def _of_texts(theory: Theory) -> tuple[Check, ...]:
    found = {(t.objective, t.tv): t for t in theory.texts}
    tvs = sorted({t.tv for t in theory.texts})
    whole = max(found["reinforce*weight('sequence', 1000000.0)", tv].relative for tv in tvs)
    token, mean = found["none", 0.01].relative, found["gspo(0.2, 0.28)", 0.01].relative
    start = {t.objective for t in theory.texts if t.tv == 0 and t.relative > UNBIASED}
    apart = ", ".join(sorted(start))
    return (
        Check("texts: the product of the ratios", "unbiased at any drift", f"at most {whole:.0e}", whole < UNBIASED),
        Check(
            "texts: a token's own ratio",
            "biased as soon as pi leaves mu",
            f"at tv 0.01 {token:.2g}; a geometric mean {mean:.2g}",
            token > 1e-3 and mean > 1e-3,
        ),
        Check("texts: bias at pi = mu", "none but the covariance terms", apart, all("cov" in name for name in start)),
    )


def _of_parting(theory: Theory) -> tuple[Check, ...]:
    used = max(max(p.used, p.used_measured) for p in theory.partings)
    weight = max(p.weight for p in theory.partings if p.delta == 12.5)
    tight = theory.tightest.used
    return (
        Check(
            "DRPO and the surrogate part",
            "within the bound",
            f"{len(theory.partings)} cases, at most {used:.2f} of it",
            used <= 1,
        ),
        Check("the bound is the best", "reached as the rate goes to 0", f"{tight:.4f} of it used", 0.999 < tight <= 1),
        Check("DRPO(12.5): |w - 1|", "at most 0.08", f"at most {weight:.3f}", weight <= 0.08),
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
