"""What every objective's loss and gradient must be: the printed formulas at 50 digits, one token at a time.

Nothing here is arranged for accuracy or speed, so nothing here can share a trick, or a mistake, with the code under
test, which this module neither imports nor resembles. A *rule* takes one `Token` and returns a `Local`; `truths` lays
a rule along a batch.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from mpmath import MPContext

mp = MPContext()
mp.dps = 50
LOG_RATIO_CAP = 20
Number = mp.mpf


class Sampled(NamedTuple):
    """What is given of one token; `p` is the proximal policy's log-probability, `score` its episode's reward."""

    l: Number
    m: Number
    a: Number
    p: Number
    score: Number

    @property
    def gap(self) -> Number:
        return self.l - self.m

    @property
    def shift(self) -> Number:
        return mp.exp(self.l) - mp.exp(self.m)


class Token(NamedTuple):
    """One token among the kept tokens of its sequence, in order, and those of the batch."""

    l: Number
    m: Number
    a: Number
    p: Number
    score: Number
    place: int
    sequence: tuple[Sampled, ...]
    batch: tuple[Sampled, ...]
    sequences: tuple[tuple[Sampled, ...], ...]

    @property
    def gaps(self) -> list[Number]:
        return [other.gap for other in self.sequence]

    @property
    def mean(self) -> Number:
        """The mean of l - m over the kept tokens of its sequence."""
        return mp.fsum(self.gaps) / len(self.gaps)

    @property
    def pi(self) -> Number:
        return mp.exp(self.l)

    @property
    def mu(self) -> Number:
        return mp.exp(self.m)

    @property
    def r(self) -> Number:
        return mp.exp(min(self.l - self.m, LOG_RATIO_CAP))

    @property
    def shift(self) -> Number:
        return self.pi - self.mu

    @property
    def divergence(self) -> Number:
        """What the tests give tokens in place of a top-K divergence: a number that can be had here too."""
        return min(abs(self.l - self.m) / 4, mp.one)


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
    margin: Number = mp.inf
    condition: Number = mp.one


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
) -> list[Truth | None]:
    """The truth of every token, None where it is masked."""
    columns = zip(logp, behavior_logp, advantage, proximal or behavior_logp, score or advantage, strict=True)
    sampled = [Sampled(*map(mp.mpf, row)) if kept else None for row, kept in zip(columns, keep, strict=True)]
    batch = tuple(one for one in sampled if one)
    members = {s: tuple(o for o, other in zip(sampled, sequence, strict=True) if o and other == s) for s in {*sequence}}
    seen = dict.fromkeys(members, 0)
    out: list[Truth | None] = []
    for one, s in zip(sampled, sequence, strict=True):
        if one is None:
            out.append(None)
            continue
        t = Token(*one, seen[s], members[s], batch, tuple(filter(None, members.values())))
        seen[s] += 1
        loss, terms, margin, condition = rule(t)
        gradient, scale = mp.fsum(terms), condition * mp.fsum(map(abs, terms))
        plain = -t.a * t.r
        weight, weight_scale = (gradient / plain, scale / abs(plain)) if t.a else (1, 1)
        out.append(Truth(*map(float, (loss, gradient, scale, weight, weight_scale, margin))))
    return out


def binary_kl(m: Number, l: Number) -> Number:
    """KL(Bern(mu) || Bern(pi)) of log-probabilities."""
    mu, rest_of_mu, rest_of_pi = mp.exp(m), -mp.expm1(m), -mp.expm1(l)
    if rest_of_mu == 0:
        return m - l
    return mu * (m - l) + rest_of_mu * mp.log(rest_of_mu / rest_of_pi) if rest_of_pi else mp.inf


def sign(x: Number) -> int:
    return (x > 0) - (x < 0)


def distance(x: Number, edge: Number) -> Number:
    """Distance of x to an edge, relative to the edge; an edge at 0 is never near."""
    return abs(x / edge - 1) if edge else mp.inf


def clip(x: Number, low: float, high: float) -> Number:
    return min(max(x, 1 - mp.mpf(low)), 1 + mp.mpf(high))


def importance_sampling(max_ratio: float | None = None) -> Rule:
    def rule(t: Token) -> Local:
        if max_ratio is None:
            return Local(-t.r * t.a, (-t.a * t.r,))
        cut = min(t.r, mp.mpf(max_ratio))
        return Local(-t.a * cut * t.l, (-t.a * cut,))

    return rule


def clipped(x: Number, t: Token, low: float, high: float, dual: float | None) -> Local:
    """-min(x A, clip(x) A) for a ratio x whose derivative is x, and PPO's dual clip of it."""
    lower, upper = 1 - mp.mpf(low), 1 + mp.mpf(high)
    value, binds = min(x * t.a, clip(x, low, high) * t.a), (t.a > 0 and x > upper) or (t.a < 0 and x < lower)
    margin = distance(x, upper if t.a > 0 else lower)
    if dual is not None and t.a < 0:
        value, binds = max(value, dual * t.a), binds or x > dual
        margin = min(margin, distance(x, mp.mpf(dual)))
    return Local(-value, (mp.mpf(0) if binds else -t.a * x,), margin)


def ppo_clip(low: float, high: float, dual: float | None = None, max_ratio: float | None = None) -> Rule:
    return lambda t: clipped(t.r if max_ratio is None else min(t.r, mp.mpf(max_ratio)), t, low, high, dual)


def gspo(low: float, high: float) -> Rule:
    return lambda t: clipped(mp.exp(min(t.mean, LOG_RATIO_CAP)), t, low, high, None)


def spo(epsilon: float) -> Rule:
    def rule(t: Token) -> Local:
        loss = -t.r * t.a + abs(t.a) * (t.r - 1) ** 2 / (2 * mp.mpf(epsilon))
        return Local(loss, (-t.a * t.r, abs(t.a) * t.r * (t.r - 1) / mp.mpf(epsilon)))

    return rule


def drpo(delta: float, power: float = 0, outside: float | None = None, advantage_weighted: bool = True) -> Rule:
    def rule(t: Token) -> Local:
        size = abs(t.a) if advantage_weighted else mp.mpf(1)
        far = mp.exp(min(max(t.l, t.m) - power * t.m, LOG_RATIO_CAP)) * (1 - mp.exp(-abs(t.l - t.m)))  # |D| / mu^q
        push = size * t.r * sign(t.l - t.m) * far / mp.mpf(delta)
        penalty = size * t.mu ** (1 - mp.mpf(power)) * (t.r - 1) ** 2 / (2 * mp.mpf(delta))
        if outside is None:
            return Local(-t.r * t.a + penalty, (-t.a * t.r, push))
        margin = distance(abs(t.shift), mp.mpf(outside))
        if abs(t.shift) <= outside:
            return Local(-t.r * t.a, (-t.a * t.r,), margin)
        return Local(-t.r * t.a + penalty, (-t.a * t.r, push), margin)

    return rule


def dppo(low: float, high: float | None = None, divergence: str = "tv", max_ratio: float = 20.0) -> Rule:
    edge_low, edge_high = mp.mpf(low), mp.mpf(low if high is None else high)

    def rule(t: Token) -> Local:
        edge = edge_high if t.a > 0 else edge_low
        if divergence == "tv":
            keep = t.shift <= edge if t.a > 0 else t.shift >= -edge
            margin = distance(t.shift if t.a > 0 else -t.shift, edge)
        else:
            far = binary_kl(t.m, t.l) if divergence == "kl" else t.divergence
            keep = far <= edge or (t.pi <= t.mu if t.a > 0 else t.pi >= t.mu)
            margin = distance(far, edge)
        cut = min(t.r, mp.mpf(max_ratio)) * keep
        return Local(-t.a * cut * t.l, (-t.a * cut,), margin)

    return rule


def symmetric_mask(delta: float, divergence: str = "tv") -> Rule:
    def rule(t: Token) -> Local:
        far = abs(t.shift) if divergence == "tv" else binary_kl(t.m, t.l)
        kept = -t.a * t.r if far <= delta else mp.mpf(0)
        return Local(kept, (kept,), distance(far, mp.mpf(delta)))

    return rule


def cispo(low: float, high: float) -> Rule:
    def rule(t: Token) -> Local:
        cut = clip(t.r, low, high)
        return Local(-t.a * cut * t.l, (-t.a * cut,))

    return rule


def sapo(tau_positive: float, tau_negative: float) -> Rule:
    def rule(t: Token) -> Local:
        tau = mp.mpf(tau_positive if t.a > 0 else tau_negative)
        s, rest = 1 / (1 + mp.exp(-tau * (t.r - 1))), 1 / (1 + mp.exp(tau * (t.r - 1)))
        return Local(-t.a * 4 / tau * s, (-t.a * t.r * 4 * s * rest,), condition=1 + tau * t.r)

    return rule


def divergence_penalty(kind: str, coefficient: float) -> Rule:
    def rule(t: Token) -> Local:
        value, slope = {
            "tv": (abs(t.r - 1) / 2, t.r * sign(t.r - 1) / 2),
            "k1": (-mp.log(t.r), mp.mpf(-1)),
            "k3": (t.r - 1 - mp.log(t.r), t.r - 1),
        }[kind]
        pull = abs(t.a) * mp.mpf(coefficient)
        return Local(-t.r * t.a + pull * value, (-t.a * t.r, pull * slope))

    return rule


# --------------------------------------------------------------------------------------- factors, sums, and their parts


class Value(NamedTuple):
    """A factor of one token: the number, the distance to its nearest jump, how ill-conditioned it is."""

    number: Number
    margin: Number = mp.inf
    condition: Number = mp.one


FactorRule = Callable[[Token], Value]


def product(rule: Rule, *factors: FactorRule) -> Rule:
    def times(t: Token) -> Local:
        local, values = rule(t), [factor(t) for factor in factors]
        number = mp.fprod(v.number for v in values)
        margin = min([local.margin, *(v.margin for v in values)])
        condition = local.condition * mp.fprod(v.condition for v in values)
        return Local(number * local.loss, tuple(number * term for term in local.terms), margin, condition)

    return times


def added(*terms: tuple[float, Rule]) -> Rule:
    def plus(t: Token) -> Local:
        parts = [(mp.mpf(weight), rule(t)) for weight, rule in terms]
        slopes = tuple(weight * term for weight, local in parts for term in local.terms)
        loss = mp.fsum(weight * local.loss for weight, local in parts)
        return Local(loss, slopes, min(p.margin for _, p in parts), max(p.condition for _, p in parts))

    return plus


def of_ratio(t: Token, over: str) -> Number:
    """r, or the product or geometric mean of its sequence's."""
    gap = {"token": t.l - t.m, "sequence": mp.fsum(t.gaps), "geometric": t.mean}[over]
    return mp.exp(min(gap, LOG_RATIO_CAP))


def roughness(t: Token, over: str) -> Number:
    """How many roundings a ratio has: none to speak of for a token's, those of the sum for a sequence's."""
    return mp.one if over == "token" else 1 + mp.fsum(map(abs, t.gaps))


def band(low: float, high: float, over: str = "token") -> FactorRule:
    def factor(t: Token) -> Value:
        ratios = [mp.exp(min(gap, LOG_RATIO_CAP)) for gap in t.gaps] if over == "every" else [of_ratio(t, over)]
        margin = min(distance(r, mp.mpf(edge)) for r in ratios for edge in (low, high))
        return Value(mp.mpf(all(low <= r <= high for r in ratios)), margin)

    return factor


def reject(statistic: str, high: float, low: float = 0) -> FactorRule:
    over, _, kind = statistic.rpartition("_")

    def estimate(gap: Number) -> Number:
        return {"k1": -gap, "k2": gap**2 / 2, "k3": mp.exp(min(gap, LOG_RATIO_CAP)) - 1 - gap}[kind]

    def factor(t: Token) -> Value:
        each = [estimate(gap) for gap in ([t.l - t.m] if over == "token" else t.gaps)]
        x = {"seq_sum": mp.fsum(each), "seq_mean": mp.fsum(each) / len(each)}.get(over, max(each))
        if kind == "k1":
            x = mp.exp(min(x, LOG_RATIO_CAP))
        margin = min(distance(x, mp.mpf(high)), distance(x, mp.mpf(low)))
        return Value(mp.mpf(low <= x <= high or (kind != "k1" and x <= high)), margin)

    return factor


def decoupled(rule: Rule, *factors: FactorRule) -> Rule:
    """The rule between policy and proximal policy, the factors between proximal policy and sampler."""

    def between(t: Token, change: Callable[[Sampled], Sampled]) -> Token:
        sequences = tuple(tuple(map(change, s)) for s in t.sequences)
        one = change(Sampled(t.l, t.m, t.a, t.p, t.score))
        return Token(*one, t.place, tuple(map(change, t.sequence)), tuple(map(change, t.batch)), sequences)

    def of(t: Token) -> Local:
        near, far = between(t, lambda o: o._replace(m=o.p)), between(t, lambda o: o._replace(l=o.p))
        return product(rule, *(lambda _, f=factor: f(far) for factor in factors))(near)

    return of


def opsm(delta: float) -> FactorRule:
    return lambda t: Value(mp.mpf(t.a >= 0 or -t.mean <= delta), distance(-t.mean, mp.mpf(delta)))


def weight(
    over: str, cap: float | None = None, low: float = 0, high: float | None = None, normalize: bool = False
) -> FactorRule:
    def of(x: Number) -> Number:
        kept = x if x >= low and (high is None or x <= high) else mp.mpf(0)
        return kept if cap is None else min(kept, mp.mpf(cap))

    def factor(t: Token) -> Value:
        x = of_ratio(t, over)
        margin = min([distance(x, mp.mpf(low)), *([] if high is None else [distance(x, mp.mpf(high))])])
        if not normalize:
            return Value(of(x), margin, roughness(t, over))
        parts = [[o.gap] for o in t.batch] if over == "token" else [[o.gap for o in s] for s in t.sequences]
        gaps = [mp.fsum(part) / (len(part) if over == "geometric" else 1) for part in parts]
        mean = mp.fsum(of(mp.exp(min(gap, LOG_RATIO_CAP))) for gap in gaps) / len(gaps)
        return Value(of(x) / mean, margin, max(roughness(t, over), *(1 + abs(gap) for gap in gaps)))

    return factor


# ------------------------------------------------------------------------------------------------- objectives of 2026


def reinforce() -> Rule:
    return lambda t: Local(-t.a * t.l, (-t.a,))


def k2() -> Rule:
    def rule(t: Token) -> Local:
        gap = min(max(t.l - t.m, -LOG_RATIO_CAP), LOG_RATIO_CAP)
        return Local(gap**2 / 2, (gap,))

    return rule


def masked(inside: Callable[[Token], tuple[bool, Number]], cap: float | None = None) -> Rule:
    """-A min(r, cap) inside, 0 outside."""

    def rule(t: Token) -> Local:
        keep, margin = inside(t)
        kept = -t.a * (t.r if cap is None else min(t.r, mp.mpf(cap))) * keep
        return Local(kept, (kept,), margin)

    return rule


def ipo(delta: float, max_ratio: float) -> Rule:
    return masked(lambda t: (abs(t.shift) <= delta, distance(abs(t.shift), mp.mpf(delta))), max_ratio)


def icepop(low: float, high: float) -> Rule:
    return masked(lambda t: (low <= t.r <= high, min(distance(t.r, mp.mpf(low)), distance(t.r, mp.mpf(high)))))


def kpop(delta: float) -> Rule:
    return product(importance_sampling(), both_ways(delta))


def both_ways(delta: float) -> FactorRule:
    def factor(t: Token) -> Value:
        far = max(binary_kl(t.m, t.l), binary_kl(t.l, t.m))
        return Value(mp.mpf(far <= delta), distance(far, mp.mpf(delta)))

    return factor


def cppo(delta: float, w_min: float, delta_b: float, horizon: int | None = None) -> Rule:
    def inside(t: Token) -> tuple[bool, Number]:
        distances = [abs(o.shift) for o in t.sequence]
        n = len(distances)
        last = max((n if horizon is None else horizon) - 1, 1)
        weights = [1 - (1 - mp.mpf(w_min)) * j / last for j in range(n)]
        ordered, place = sorted(distances), (n - 1) * mp.mpf(9) / 10
        below = int(mp.floor(place))
        quantile = ordered[below] + (place - below) * (ordered[min(below + 1, n - 1)] - ordered[below])
        budget = min(max(quantile, mp.mpf(delta_b)), 2 * mp.mpf(delta_b))
        spent = mp.fsum(w * d for w, d in list(zip(weights, distances, strict=True))[: t.place])
        room = min(mp.mpf(delta), delta + budget * mp.fsum(weights[: t.place]) - spent)
        cost = weights[t.place] * distances[t.place]
        return t.a * (t.r - 1) <= 0 or cost <= room, abs(cost - room) / mp.mpf(delta)

    return masked(inside)


def vespo(
    k_positive: float = 2,
    lambda_positive: float = 3,
    k_negative: float = 3,
    lambda_negative: float = 2,
    max_ratio: float | None = None,
) -> Rule:
    def rule(t: Token) -> Local:
        k, scale = (k_positive, lambda_positive) if t.a >= 0 else (k_negative, lambda_negative)
        gaps = t.gaps
        if max_ratio is not None:
            gaps = [o.l - o.p + min(o.p - o.m, mp.log(mp.mpf(max_ratio))) for o in t.sequence]
        s = min(max(mp.fsum(gaps), mp.log(mp.mpf("1e-8"))), LOG_RATIO_CAP)
        phi = mp.exp(scale) * mp.exp(s) ** k * mp.exp(-scale * mp.exp(s))
        condition = (1 + mp.fsum(map(abs, gaps))) * (1 + k + scale * mp.exp(s))
        return Local(-t.a * phi * t.l, (-t.a * phi,), condition=condition)

    return rule


def gmpo(low: float, high: float) -> Rule:
    def rule(t: Token) -> Local:
        gap = t.l - t.m
        clipped_gaps = [min(o.gap, mp.mpf(high)) if o.a > 0 else max(o.gap, -mp.mpf(low)) for o in t.sequence]
        s = mp.exp(min(mp.fsum(clipped_gaps) / len(clipped_gaps), LOG_RATIO_CAP))
        binds = gap > high if t.a > 0 else gap < -low
        margin = distance(gap, mp.mpf(high) if t.a > 0 else -mp.mpf(low))
        return Local(-t.a * s, (mp.mpf(0) if binds else -t.a * s,), margin, 1 + mp.fsum(map(abs, clipped_gaps)))

    return rule


@cache
def moment_bound(batch: tuple[Sampled, ...], budget: float) -> tuple[Number, Number]:
    """tau^2 of a batch, and how near a winsorised mean is to the budget."""
    harmful = sorted(o.gap**2 for o in batch if o.a * o.gap > 0)
    means = [mp.fsum(min(v, cut) for v in harmful) / len(harmful) for cut in harmful]
    square = mp.inf
    if harmful and mp.fsum(harmful) / len(harmful) > budget:
        square = max([cut for cut, mean in zip(harmful, means, strict=True) if mean < budget], default=mp.mpf(0))
    return square, min([distance(mean, mp.mpf(budget)) for mean in means], default=mp.inf)


def m2po(budget: float, floor_low: float = 0, floor_high: float = 0) -> Rule:
    def rule(t: Token) -> Local:
        square, margin = moment_bound(t.batch, budget)
        outward, v = t.a * (t.l - t.m) > 0, (t.l - t.m) ** 2
        outside = t.r < 1 - mp.mpf(floor_low) or t.r > 1 + mp.mpf(floor_high)
        if floor_low or floor_high:
            margin = min(margin, distance(t.r, 1 - mp.mpf(floor_low)), distance(t.r, 1 + mp.mpf(floor_high)))
        if not (outward and v >= square and outside):
            return Local(-t.a * t.r, (-t.a * t.r,), margin)
        tau = min(mp.sqrt(square), LOG_RATIO_CAP)
        bound = max(mp.exp(tau), 1 + mp.mpf(floor_high)) if t.a > 0 else min(mp.exp(-tau), 1 - mp.mpf(floor_low))
        return Local(-t.a * bound, (mp.mpf(0),), margin)

    return rule


def m2po_areal(threshold: float) -> Rule:
    return product(importance_sampling(), second_moment(threshold))


def second_moment(threshold: float) -> FactorRule:
    def factor(t: Token) -> Value:
        largest, margin = largest_kept(t.batch, threshold)
        return Value(mp.mpf((t.l - t.m) ** 2 <= largest), margin)

    return factor


@cache
def largest_kept(batch: tuple[Sampled, ...], threshold: float) -> tuple[Number, Number]:
    """The largest square that AReaL's M2PO keeps of a batch, and how near a mean is to the threshold."""
    squares = sorted(o.gap**2 for o in batch)
    means = [mp.fsum(squares[: i + 1]) / (i + 1) for i in range(len(squares))]
    kept = [v for v, mean in zip(squares, means, strict=True) if mean < threshold] or squares[:1]
    return kept[-1], min(distance(mean, mp.mpf(threshold)) for mean in means)


@cache
def means(batch: tuple[Sampled, ...]) -> tuple[Number, Number]:
    """The means of A and of l."""
    return mp.fsum(o.a for o in batch) / len(batch), mp.fsum(o.l for o in batch) / len(batch)


def covariance(t: Token) -> tuple[Number, list[Number]]:
    """The token's term of the covariance of advantage and log-probability, and every token's."""
    mean_a, mean_l = means(t.batch)
    return (t.a - mean_a) * (t.l - mean_l), [(o.a - mean_a) * (o.l - mean_l) for o in t.batch]


def clip_cov(low: float, high: float, cov_low: float, cov_high: float) -> Rule:
    """With fraction 1: every eligible token is dropped."""

    def rule(t: Token) -> Local:
        local, (cov, _) = clipped(t.r, t, low, high, None), covariance(t)
        free = not ((t.a > 0 and t.r > 1 + mp.mpf(high)) or (t.a < 0 and t.r < 1 - mp.mpf(low)))
        margin = min(local.margin, distance(cov, mp.mpf(cov_low)), distance(cov, mp.mpf(cov_high)))
        return local._replace(margin=margin) if not (free and cov_low < cov < cov_high) else Local(*ZERO, margin)

    return rule


ZERO = (mp.mpf(0), (mp.mpf(0),))


def kl_cov(fraction: float, coefficient: float) -> Rule:
    def rule(t: Token) -> Local:
        cov, all_of = covariance(t)
        falling = sorted(all_of, reverse=True)
        n = max(1, int(fraction * len(falling)))
        gap = min(max(t.l - t.m, -LOG_RATIO_CAP), LOG_RATIO_CAP)
        pull = mp.mpf(coefficient) * (cov >= falling[n - 1])
        spread = max(map(abs, all_of)) or mp.one
        margin = min([abs(falling[n - 1] - falling[n]) / spread] if n < len(falling) else [mp.inf])
        return Local(-t.r * t.a + pull * abs(gap), (-t.a * t.r, pull * sign(gap)), margin)

    return rule


def topr(positive: float = 1, negative: float = 1, over: str = "token") -> Rule:
    def rule(t: Token) -> Local:
        factor = mp.mpf(positive) if t.score > 0 else negative * min(of_ratio(t, over), mp.one)
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
    low, high, beta, alpha, mass = (mp.mpf(v) for v in (low, high, beta, alpha, mass))

    def within(x: Number, room: Number) -> Number:
        return room * mp.tanh(beta * x / room)

    def effective(t: Token) -> tuple[Number, Number]:
        """e, and how ill-conditioned it is."""
        x = min(t.l - t.m, mp.mpf(LOG_RATIO_CAP))
        r = mp.exp(x)
        z = {
            "log_ratio": x,
            "ratio_delta": r - 1,
            "prob_diff": t.shift,
            "bkl_grad": t.shift / max(-mp.expm1(t.l), mp.mpf("1e-8")),
            "fisher": t.shift / mp.sqrt(-t.mu * mp.expm1(t.m) + mp.mpf("1e-8")),
        }[metric]
        if metric_clip is not None:
            z = max(min(z, mp.mpf(metric_clip)), -mp.mpf(metric_clip))
        up, down = max(z, mp.mpf(0)), max(-z, mp.mpf(0))
        rough = 1 + beta * abs(z)
        if map == "none":
            return r, mp.one
        if map == "log_tanh":
            fall = within(down, -mp.log(low)) if low else down
            return mp.exp(within(up, mp.log(high)) - fall), 1 + abs(x)
        if map == "tanh_bound":
            return 1 + within(up, high - 1) - within(down, 1 - low), rough
        if map == "sigmoid_bound":
            target = (1 - low) / (high - low)
            return low + (high - low) / (1 + (1 / target - 1) * mp.exp(-beta * z)), rough
        e = {
            "clip": r,
            "power": r**alpha,
            "mass_power": r ** (t.mu / (t.mu + mass)),
            "residual_sech": 1 + (r - 1) / mp.cosh(x / beta) ** 2,
        }[map]
        return min(max(e, low), high), 1 + abs(x) / beta

    def rule(t: Token) -> Local:
        e, condition = effective(t)
        terms = (-t.a * e, abs(t.a) * t.mu * e * (e - 1) / mp.mpf(delta))
        return Local(mp.fsum(terms) * t.l, terms, condition=condition)

    return rule
