"""What every objective's loss and gradient must be: the printed formulas at 50 digits, one token at a time.

Nothing here is arranged for accuracy or speed, so nothing here can share a trick, or a mistake, with the code under
test, which this module neither imports nor resembles. A *rule* takes one `Token` and returns a `Local`; `truths` lays
a rule along a batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from functools import lru_cache
from itertools import chain
from math import prod
from typing import NamedTuple

Number = Decimal
DIGITS = Context(prec=50, Emin=MIN_EMIN, Emax=MAX_EMAX)
LOG_RATIO_CAP = Number(20)
once = lru_cache(1000)
"""For what several tokens have in common."""
exp, log, sqrt = once(Decimal.exp), once(Decimal.ln), Decimal.sqrt


@dataclass(eq=False)
class Token:
    """What is given of one kept token, and where it stands: in its sequence, and its sequence in the batch.

    `p` and `ref` are the log-probabilities of the proximal policy and of the reference model, `score` is its episode's
    reward.
    """

    l: Number
    m: Number
    a: Number
    p: Number
    score: Number
    ref: Number
    place: int = field(init=False, repr=False)
    sequence: "Kept" = field(init=False, repr=False)
    batch: "tuple[Kept, ...]" = field(init=False, repr=False)

    @property
    def gap(self) -> Number:
        return self.l - self.m

    @property
    def gaps(self) -> list[Number]:
        return [o.gap for o in self.sequence]

    @property
    def mean(self) -> Number:
        """The mean of l - m over the kept tokens of its sequence."""
        return sum(self.gaps) / len(self.gaps)

    @property
    def pi(self) -> Number:
        return exp(self.l)

    @property
    def mu(self) -> Number:
        return exp(self.m)

    @property
    def r(self) -> Number:
        return exp(min(self.gap, LOG_RATIO_CAP))

    @property
    def shift(self) -> Number:
        return self.pi - self.mu

    @property
    def divergence(self) -> Number:
        """What the tests give tokens in place of a top-K divergence: a number that can be had here too."""
        return min(abs(self.gap) / 4, Number(1))


Kept = tuple[Token, ...]


def batch_of(sequences: Iterable[Iterable[Token]]) -> tuple[Kept, ...]:
    """A batch of these sequences, but for the empty ones, whose tokens know where they stand."""
    batch = tuple(filter(None, map(tuple, sequences)))
    for sequence in batch:
        for place, token in enumerate(sequence):
            token.place, token.sequence, token.batch = place, sequence, batch
    return batch


class Local(NamedTuple):
    """What a rule says of one token.

    Args:
        loss: the loss.
        terms: d loss / d l, as the terms that the formula adds up.
        margin: relative distance to the nearest jump of the gradient; infinite where it has none.
        condition: how many times larger than a relative error of r the gradient's may be.
    """

    loss: Number
    terms: tuple[Number, ...]
    margin: Number = Number("inf")
    condition: Number = Number(1)


class Truth(NamedTuple):
    """What is true of one token.

    Args:
        loss: the loss.
        gradient: d loss / d l.
        scale: the sum of the sizes of the gradient's terms, times the condition; errors are counted relative to it,
            because where the terms cancel (the edge of a trust region) no arithmetic can do better.
        weight: gradient / (-a r), and 1 where a = 0.
        weight_scale: scale / |a r|, and 1 where a = 0.
        margin: as in `Local`.
    """

    loss: float
    gradient: float
    scale: float
    weight: float
    weight_scale: float
    margin: float


Rule = Callable[[Token], Local]


def truths(
    rule: Rule,
    logp: Sequence[float],
    behavior_logp: Sequence[float],
    advantage: Sequence[float],
    keep: Sequence[bool],
    sequence: Sequence[int],
    proximal: Sequence[float] | None = None,
    score: Sequence[float] | None = None,
    ref: Sequence[float] | None = None,
) -> list[Truth | None]:
    """The truth of every token, None where it is masked."""
    extra = (proximal or behavior_logp, score or advantage, ref or behavior_logp)
    columns = zip(logp, behavior_logp, advantage, *extra, strict=True)
    tokens = [Token(*map(Number, row)) if kept else None for row, kept in zip(columns, keep, strict=True)]
    batch_of([t for t, other in zip(tokens, sequence, strict=True) if t and other == s] for s in {*sequence})
    out: list[Truth | None] = []
    for t in tokens:
        if t is None:
            out.append(None)
            continue
        with localcontext(DIGITS):
            loss, terms, margin, condition = rule(t)
            gradient, scale = sum(terms), condition * sum(map(abs, terms))
            plain = -t.a * t.r
            weight, weight_scale = (gradient / plain, scale / abs(plain)) if t.a else (1, 1)
            out.append(Truth(*map(float, (loss, gradient, scale, weight, weight_scale, margin))))
    return out


def binary_kl(m: Number, l: Number) -> Number:
    """KL(Bern(mu) || Bern(pi)) of log-probabilities."""
    mu, rest_of_mu, rest_of_pi = exp(m), 1 - exp(m), 1 - exp(l)
    if rest_of_mu == 0:
        return m - l
    return mu * (m - l) + rest_of_mu * log(rest_of_mu / rest_of_pi) if rest_of_pi else Number("inf")


def sign(x: Number) -> int:
    return (x > 0) - (x < 0)


def distance(x: Number, edge: Number) -> Number:
    """Distance of x to an edge, relative to the edge; an edge at 0 is never near."""
    return abs(x / edge - 1) if edge else Number("inf")


def clip(x: Number, low: float, high: float) -> Number:
    return min(max(x, 1 - Number(low)), 1 + Number(high))


def importance_sampling(max_ratio: float | None = None) -> Rule:
    def rule(t: Token) -> Local:
        if max_ratio is None:
            return Local(-t.r * t.a, (-t.a * t.r,))
        cut = min(t.r, Number(max_ratio))
        return Local(-t.a * cut * t.l, (-t.a * cut,))

    return rule


def clipped(x: Number, t: Token, low: float, high: float, dual: float | None) -> Local:
    """-min(x A, clip(x) A) for a ratio x whose derivative is x, and PPO's dual clip of it."""
    lower, upper = 1 - Number(low), 1 + Number(high)
    value, binds = min(x * t.a, clip(x, low, high) * t.a), (t.a > 0 and x > upper) or (t.a < 0 and x < lower)
    margin = distance(x, upper if t.a > 0 else lower)
    if dual is not None and t.a < 0:
        value, binds = max(value, Number(dual) * t.a), binds or x > dual
        margin = min(margin, distance(x, Number(dual)))
    return Local(-value, (Number(0) if binds else -t.a * x,), margin)


def ppo_clip(low: float, high: float, dual: float | None = None, max_ratio: float | None = None) -> Rule:
    return lambda t: clipped(t.r if max_ratio is None else min(t.r, Number(max_ratio)), t, low, high, dual)


def gspo(low: float, high: float) -> Rule:
    return lambda t: clipped(exp(min(t.mean, LOG_RATIO_CAP)), t, low, high, None)


def spo(epsilon: float) -> Rule:
    def rule(t: Token) -> Local:
        loss = -t.r * t.a + abs(t.a) * (t.r - 1) ** 2 / (2 * Number(epsilon))
        return Local(loss, (-t.a * t.r, abs(t.a) * t.r * (t.r - 1) / Number(epsilon)))

    return rule


def drpo(delta: float, power: float = 0, outside: float | None = None, advantage_weighted: bool = True) -> Rule:
    def rule(t: Token) -> Local:
        size = abs(t.a) if advantage_weighted else Number(1)
        far = exp(min(max(t.l, t.m) - Number(power) * t.m, LOG_RATIO_CAP)) * (1 - exp(-abs(t.gap)))  # |D| / mu^q
        push = size * t.r * sign(t.gap) * far / Number(delta)
        penalty = size * exp((1 - Number(power)) * t.m) * (t.r - 1) ** 2 / (2 * Number(delta))
        if outside is None:
            return Local(-t.r * t.a + penalty, (-t.a * t.r, push))
        margin = distance(abs(t.shift), Number(outside))
        if abs(t.shift) <= outside:
            return Local(-t.r * t.a, (-t.a * t.r,), margin)
        return Local(-t.r * t.a + penalty, (-t.a * t.r, push), margin)

    return rule


def dppo(low: float, high: float | None = None, divergence: str = "tv", max_ratio: float = 20.0) -> Rule:
    edge_low, edge_high = Number(low), Number(low if high is None else high)

    def rule(t: Token) -> Local:
        edge = edge_high if t.a > 0 else edge_low
        if divergence == "tv":
            keep = t.shift <= edge if t.a > 0 else t.shift >= -edge
            margin = distance(t.shift if t.a > 0 else -t.shift, edge)
        else:
            far = binary_kl(t.m, t.l) if divergence == "kl" else t.divergence
            keep = far <= edge or (t.pi <= t.mu if t.a > 0 else t.pi >= t.mu)
            margin = distance(far, edge)
        cut = min(t.r, Number(max_ratio)) * keep
        return Local(-t.a * cut * t.l, (-t.a * cut,), margin)

    return rule


def symmetric_mask(delta: float, divergence: str = "tv") -> Rule:
    def inside(t: Token) -> tuple[bool, Number]:
        far = abs(t.shift) if divergence == "tv" else binary_kl(t.m, t.l)
        return far <= delta, distance(far, Number(delta))

    return masked(inside)


def cispo(low: float, high: float) -> Rule:
    def rule(t: Token) -> Local:
        cut = clip(t.r, low, high)
        return Local(-t.a * cut * t.l, (-t.a * cut,))

    return rule


def sapo(tau_positive: float, tau_negative: float) -> Rule:
    def rule(t: Token) -> Local:
        tau = Number(tau_positive if t.a > 0 else tau_negative)
        s, rest = 1 / (1 + exp(-tau * (t.r - 1))), 1 / (1 + exp(tau * (t.r - 1)))
        return Local(-t.a * 4 / tau * s, (-t.a * t.r * 4 * s * rest,), condition=1 + tau * t.r)

    return rule


def divergence_penalty(kind: str, coefficient: float) -> Rule:
    def rule(t: Token) -> Local:
        value, slope = {
            "tv": (abs(t.r - 1) / 2, t.r * sign(t.r - 1) / 2),
            "k1": (-log(t.r), Number(-1)),
            "k3": (t.r - 1 - log(t.r), t.r - 1),
        }[kind]
        pull = abs(t.a) * Number(coefficient)
        return Local(-t.r * t.a + pull * value, (-t.a * t.r, pull * slope))

    return rule


# --------------------------------------------------------------------------------------- factors, sums, and their parts


class Value(NamedTuple):
    """A factor of one token: the number, the distance to its nearest jump, how ill-conditioned it is."""

    number: Number
    margin: Number = Number("inf")
    condition: Number = Number(1)


FactorRule = Callable[[Token], Value]


def product(rule: Rule, *factors: FactorRule) -> Rule:
    def times(t: Token) -> Local:
        local, values = rule(t), [factor(t) for factor in factors]
        number = prod(v.number for v in values)
        margin = min([local.margin, *(v.margin for v in values)])
        condition = local.condition * prod(v.condition for v in values)
        return Local(number * local.loss, tuple(number * term for term in local.terms), margin, condition)

    return times


def added(*terms: tuple[float, Rule]) -> Rule:
    def plus(t: Token) -> Local:
        parts = [(Number(weight), rule(t)) for weight, rule in terms]
        slopes = tuple(weight * term for weight, local in parts for term in local.terms)
        loss = sum(weight * local.loss for weight, local in parts)
        return Local(loss, slopes, min(p.margin for _, p in parts), max(p.condition for _, p in parts))

    return plus


def of_ratio(t: Token, over: str) -> Number:
    """r, or the product or geometric mean of its sequence's."""
    gap = {"token": t.gap, "sequence": sum(t.gaps), "geometric": t.mean}[over]
    return exp(min(gap, LOG_RATIO_CAP))


def roughness(t: Token, over: str) -> Number:
    """How many roundings a ratio has: none to speak of for a token's, those of the sum for a sequence's."""
    return Number(1) if over == "token" else 1 + sum(map(abs, t.gaps))


def band(low: float, high: float, over: str = "token") -> FactorRule:
    def factor(t: Token) -> Value:
        ratios = [o.r for o in t.sequence] if over == "every" else [of_ratio(t, over)]
        margin = min(distance(r, Number(edge)) for r in ratios for edge in (low, high))
        return Value(Number(all(low <= r <= high for r in ratios)), margin)

    return factor


def reject(statistic: str, high: float, low: float = 0) -> FactorRule:
    over, _, kind = statistic.rpartition("_")

    def factor(t: Token) -> Value:
        some = [t] if over == "token" else t.sequence
        each = [{"k1": -o.gap, "k2": o.gap**2 / 2, "k3": o.r - 1 - o.gap}[kind] for o in some]
        x = {"seq_sum": sum(each), "seq_mean": sum(each) / len(each)}.get(over, max(each))
        if kind == "k1":
            x = exp(min(x, LOG_RATIO_CAP))
        margin = min(distance(x, Number(high)), distance(x, Number(low)))
        return Value(Number(low <= x <= high or (kind != "k1" and x <= high)), margin)

    return factor


@once
def with_proximal(batch: tuple[Kept, ...], place: str) -> dict[Token, Token]:
    """Each token of the batch, and the same with the proximal policy in another's place."""
    changed = batch_of([replace(t, **{place: t.p}) for t in sequence] for sequence in batch)
    return dict(zip(chain(*batch), chain(*changed), strict=True))


def decoupled(rule: Rule, *factors: FactorRule) -> Rule:
    """The rule between policy and proximal policy, the factors between proximal policy and sampler."""

    def of(t: Token) -> Local:
        near, far = with_proximal(t.batch, "m")[t], with_proximal(t.batch, "l")[t]
        return product(rule, *(lambda _, f=factor: f(far) for factor in factors))(near)

    return of


def opsm(delta: float) -> FactorRule:
    return lambda t: Value(Number(t.a >= 0 or -t.mean <= delta), distance(-t.mean, Number(delta)))


def weight(
    over: str,
    cap: float | None = None,
    low: float = 0,
    high: float | None = None,
    normalize: bool = False,
    floor: float = 0,
) -> FactorRule:
    def of(x: Number) -> Number:
        kept = max(x, Number(floor)) if x >= low and (high is None or x <= high) else Number(0)
        return kept if cap is None else min(kept, Number(cap))

    @once
    def normaliser(batch: tuple[Kept, ...]) -> tuple[Number, Number]:
        """The mean over the batch, and its roundings."""
        some = [*chain(*batch)] if over == "token" else [sequence[0] for sequence in batch]
        ratios = [of_ratio(t, over) for t in some]
        return sum(map(of, ratios)) / len(some), max(1 + abs(log(x)) for x in ratios)

    def factor(t: Token) -> Value:
        x = of_ratio(t, over)
        margin = min([distance(x, Number(low)), *([] if high is None else [distance(x, Number(high))])])
        mean, rough = normaliser(t.batch) if normalize else (1, 1)
        return Value(of(x) / mean, margin, max(roughness(t, over), rough))

    return factor


# ------------------------------------------------------------------------------------------------- objectives of 2026


def reinforce() -> Rule:
    return lambda t: Local(-t.a * t.l, (-t.a,))


def k2() -> Rule:
    def rule(t: Token) -> Local:
        gap = min(max(t.gap, -LOG_RATIO_CAP), LOG_RATIO_CAP)
        return Local(gap**2 / 2, (gap,))

    return rule


def ref_kl(delta: float) -> Rule:
    def rule(t: Token) -> Local:
        apart = (t.ref, -t.l) if abs(t.ref - t.l) < LOG_RATIO_CAP else (LOG_RATIO_CAP * sign(t.ref - t.l),)
        terms = tuple(-t.r * term * (t.shift >= -delta) for term in apart)
        return Local(sum(terms), terms, distance(t.shift, -Number(delta)))

    return rule


def masked(inside: Callable[[Token], tuple[bool, Number]], cap: float | None = None) -> Rule:
    """-A min(r, cap) inside, 0 outside."""

    def rule(t: Token) -> Local:
        keep, margin = inside(t)
        kept = -t.a * (t.r if cap is None else min(t.r, Number(cap))) * keep
        return Local(kept, (kept,), margin)

    return rule


def ipo(delta: float, max_ratio: float) -> Rule:
    return masked(lambda t: (abs(t.shift) <= delta, distance(abs(t.shift), Number(delta))), max_ratio)


def icepop(low: float, high: float) -> Rule:
    return masked(lambda t: (low <= t.r <= high, min(distance(t.r, Number(low)), distance(t.r, Number(high)))))


def kpop(delta: float) -> Rule:
    return product(importance_sampling(), both_ways(delta))


def both_ways(delta: float) -> FactorRule:
    def factor(t: Token) -> Value:
        far = max(binary_kl(t.m, t.l), binary_kl(t.l, t.m))
        return Value(Number(far <= delta), distance(far, Number(delta)))

    return factor


def cppo(
    delta: float, w_min: float, delta_b: float, horizon: int | None = None, max_ratio: float | None = None
) -> Rule:
    @once
    def costs_and_rooms(sequence: Kept) -> list[tuple[Number, Number]]:
        distances = [abs(o.shift) for o in sequence]
        n = len(distances)
        last = max((n if horizon is None else horizon) - 1, 1)
        weights = [1 - (1 - Number(w_min)) * j / last for j in range(n)]
        ordered, place = sorted(distances), (n - 1) * Number(9) / 10
        below = int(place)
        quantile = ordered[below] + (place - below) * (ordered[min(below + 1, n - 1)] - ordered[below])
        budget = min(max(quantile, Number(delta_b)), 2 * Number(delta_b))
        costs = [w * d for w, d in zip(weights, distances, strict=True)]
        left = [Number(delta) + budget * sum(weights[:i]) - sum(costs[:i]) for i in range(n)]
        return [(cost, min(Number(delta), room)) for cost, room in zip(costs, left, strict=True)]

    def inside(t: Token) -> tuple[bool, Number]:
        cost, room = costs_and_rooms(t.sequence)[t.place]
        return t.a * (t.r - 1) <= 0 or cost <= room, abs(cost - room) / Number(delta)

    return masked(inside, max_ratio)


def vespo(
    k_positive: float = 2,
    lambda_positive: float = 3,
    k_negative: float = 3,
    lambda_negative: float = 2,
    max_ratio: float | None = None,
) -> Rule:
    def rule(t: Token) -> Local:
        k, scale = map(Number, (k_positive, lambda_positive) if t.a >= 0 else (k_negative, lambda_negative))
        gaps = t.gaps
        if max_ratio is not None:
            gaps = [o.l - o.p + min(o.p - o.m, log(Number(max_ratio))) for o in t.sequence]
        s = min(max(sum(gaps), log(Number("1e-8"))), LOG_RATIO_CAP)
        phi = exp(scale) * exp(s) ** k * exp(-scale * exp(s))
        condition = (1 + sum(map(abs, gaps))) * (1 + k + scale * exp(s))
        return Local(-t.a * phi * t.l, (-t.a * phi,), condition=condition)

    return rule


def gmpo(low: float, high: float) -> Rule:
    def rule(t: Token) -> Local:
        clipped_gaps = [min(o.gap, Number(high)) if o.a > 0 else max(o.gap, -Number(low)) for o in t.sequence]
        s = exp(min(sum(clipped_gaps) / len(clipped_gaps), LOG_RATIO_CAP))
        binds = t.gap > high if t.a > 0 else t.gap < -low
        margin = distance(t.gap, Number(high) if t.a > 0 else -Number(low))
        return Local(-t.a * s, (Number(0) if binds else -t.a * s,), margin, 1 + sum(map(abs, clipped_gaps)))

    return rule


@once
def moment_bound(batch: tuple[Kept, ...], budget: float) -> tuple[Number, Number]:
    """tau^2 of a batch, and how near a winsorised mean is to the budget."""
    harmful = sorted(o.gap**2 for o in chain(*batch) if o.a * o.gap > 0)
    means = [sum(min(v, cut) for v in harmful) / len(harmful) for cut in harmful]
    square = Number("inf")
    if harmful and sum(harmful) / len(harmful) > budget:
        square = max([cut for cut, mean in zip(harmful, means, strict=True) if mean < budget], default=Number(0))
    return square, min([distance(mean, Number(budget)) for mean in means], default=Number("inf"))


def m2po(budget: float, floor_low: float = 0, floor_high: float = 0) -> Rule:
    def rule(t: Token) -> Local:
        square, margin = moment_bound(t.batch, budget)
        outward, v = t.a * t.gap > 0, t.gap**2
        outside = t.r < 1 - Number(floor_low) or t.r > 1 + Number(floor_high)
        if floor_low or floor_high:
            margin = min(margin, distance(t.r, 1 - Number(floor_low)), distance(t.r, 1 + Number(floor_high)))
        if not (outward and v >= square and outside):
            return Local(-t.a * t.r, (-t.a * t.r,), margin)
        tau = min(sqrt(square), LOG_RATIO_CAP)
        bound = max(exp(tau), 1 + Number(floor_high)) if t.a > 0 else min(exp(-tau), 1 - Number(floor_low))
        return Local(-t.a * bound, (Number(0),), margin)

    return rule


def m2po_areal(threshold: float) -> Rule:
    return product(importance_sampling(), second_moment(threshold))


def second_moment(threshold: float) -> FactorRule:
    def factor(t: Token) -> Value:
        largest, margin = largest_kept(t.batch, threshold)
        return Value(Number(t.gap**2 <= largest), margin)

    return factor


@once
def largest_kept(batch: tuple[Kept, ...], threshold: float) -> tuple[Number, Number]:
    """The largest square that AReaL's M2PO keeps of a batch, and how near a mean is to the threshold."""
    squares = sorted(o.gap**2 for o in chain(*batch))
    means = [sum(squares[: i + 1]) / (i + 1) for i in range(len(squares))]
    kept = [v for v, mean in zip(squares, means, strict=True) if mean < threshold] or squares[:1]
    return kept[-1], min(distance(mean, Number(threshold)) for mean in means)


@once
def covariances(batch: tuple[Kept, ...]) -> dict[Token, Number]:
    """Every token's term of the covariance of advantage and log-probability, the largest first."""
    tokens = [*chain(*batch)]
    mean_a, mean_l = sum(t.a for t in tokens) / len(tokens), sum(t.l for t in tokens) / len(tokens)
    each = {t: (t.a - mean_a) * (t.l - mean_l) for t in tokens}
    return {t: each[t] for t in sorted(tokens, key=each.__getitem__, reverse=True)}


def clip_cov(low: float, high: float, cov_low: float, cov_high: float) -> Rule:
    """With fraction 1: every eligible token is dropped."""

    def rule(t: Token) -> Local:
        local, cov = clipped(t.r, t, low, high, None), covariances(t.batch)[t]
        free = not ((t.a > 0 and t.r > 1 + Number(high)) or (t.a < 0 and t.r < 1 - Number(low)))
        margin = min(local.margin, distance(cov, Number(cov_low)), distance(cov, Number(cov_high)))
        return local._replace(margin=margin) if not (free and cov_low < cov < cov_high) else Local(*ZERO, margin)

    return rule


ZERO = (Number(0), (Number(0),))


def kl_cov(fraction: float, coefficient: float) -> Rule:
    def rule(t: Token) -> Local:
        falling = [*covariances(t.batch).values()]
        n = max(1, int(fraction * len(falling)))
        gap = min(max(t.gap, -LOG_RATIO_CAP), LOG_RATIO_CAP)
        pull = Number(coefficient) * (covariances(t.batch)[t] >= falling[n - 1])
        spread = max(map(abs, falling)) or Number(1)
        margin = min([abs(falling[n - 1] - falling[n]) / spread] if n < len(falling) else [Number("inf")])
        return Local(-t.r * t.a + pull * abs(gap), (-t.a * t.r, pull * sign(gap)), margin)

    return rule


def topr(positive: float = 1, negative: float = 1, over: str = "token") -> Rule:
    def rule(t: Token) -> Local:
        factor = Number(positive) if t.score > 0 else Number(negative) * min(of_ratio(t, over), Number(1))
        return Local(-t.a * factor * t.l, (-t.a * factor,), condition=roughness(t, over))

    return rule


def drpo_eff(
    delta: float,
    map: str = "log_tanh",
    metric: str = "log_ratio",
    low: float = 0,
    high: float = 2,
    beta: float = 1,
    alpha: float = 0.5,
    mass: float = 1e-4,
    metric_clip: float | None = None,
) -> Rule:
    low, high, beta, alpha, mass = (Number(v) for v in (low, high, beta, alpha, mass))

    def within(x: Number, room: Number) -> Number:
        return room * (1 - 2 / (exp(2 * beta * x / room) + 1))

    def effective(t: Token) -> tuple[Number, Number]:
        """e, and how ill-conditioned it is."""
        x = min(t.gap, Number(LOG_RATIO_CAP))
        r = exp(x)
        z = {
            "log_ratio": x,
            "ratio_delta": r - 1,
            "prob_diff": t.shift,
            "bkl_grad": t.shift / max(1 - t.pi, Number("1e-8")),
            "fisher": t.shift / sqrt(t.mu * (1 - t.mu) + Number("1e-8")),
        }[metric]
        if metric_clip is not None:
            z = max(min(z, Number(metric_clip)), -Number(metric_clip))
        up, down = max(z, Number(0)), max(-z, Number(0))
        rough = 1 + beta * abs(z)
        if map == "none":
            return r, Number(1)
        if map == "log_tanh":
            fall = within(down, -log(low)) if low else down
            return exp(within(up, log(high)) - fall), 1 + abs(x)
        if map == "tanh_bound":
            return 1 + within(up, high - 1) - within(down, 1 - low), rough
        if map == "sigmoid_bound":
            target = (1 - low) / (high - low)
            return low + (high - low) / (1 + (1 / target - 1) * exp(-beta * z)), rough
        e = {
            "clip": r,
            "power": r**alpha,
            "mass_power": r ** (t.mu / (t.mu + mass)),
            "residual_sech": 1 + (r - 1) * 4 / (exp(x / beta) + exp(-x / beta)) ** 2,
        }[map]
        return min(max(e, low), high), 1 + abs(x) / beta

    def rule(t: Token) -> Local:
        e, condition = effective(t)
        terms = (-t.a * e, abs(t.a) * t.mu * e * (e - 1) / Number(delta))
        return Local(sum(terms) * t.l, terms, condition=condition)

    return rule
