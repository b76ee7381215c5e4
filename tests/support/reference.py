"""What every objective's loss and gradient must be: the printed formulas at 50 digits, one token at a time.

Nothing here is arranged for accuracy or speed, so nothing here can share a trick, or a mistake, with the code under
test, which this module neither imports nor resembles. A *rule* takes one `Token` and returns a `Local`; `truths` lays
a rule along a batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mpmath import MPContext

mp = MPContext()
mp.dps = 50
LOG_RATIO_CAP = 20
Number = mp.mpf


class Token(NamedTuple):
    """One token; `mean` is the mean of l - m over the kept tokens of its sequence."""

    l: Number
    m: Number
    a: Number
    mean: Number

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
) -> list[Truth | None]:
    """The truth of every token, None where it is masked."""
    gaps: dict[int, list[Number]] = {}
    for log_pi, log_mu, kept, s in zip(logp, behavior_logp, keep, sequence, strict=True):
        if kept:
            gaps.setdefault(s, []).append(mp.mpf(log_pi) - mp.mpf(log_mu))
    out: list[Truth | None] = []
    for log_pi, log_mu, adv, kept, s in zip(logp, behavior_logp, advantage, keep, sequence, strict=True):
        if not kept:
            out.append(None)
            continue
        t = Token(mp.mpf(log_pi), mp.mpf(log_mu), mp.mpf(adv), mp.fsum(gaps[s]) / len(gaps[s]))
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


def ppo_clip(low: float, high: float, dual: float | None = None) -> Rule:
    return lambda t: clipped(t.r, t, low, high, dual)


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
