"""The lab's statistics against enumeration, closed forms and simulation.

Not covered: whether seeds are a fair sample of what training may do; no statistic knows that.
"""

import math
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from drpo.errors import InputError
from drpo.lab.curves import area_under_curve, smoothed, steps_to
from drpo.lab.statistics import (
    Interval,
    iqm,
    paired_difference,
    probability_of_improvement,
    rate,
    stratified_interval,
    t_interval,
)
from interval_coverage import DISTRIBUTIONS, INTERVALS, coverage
from support.grids import each_pair

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "statistics.md"
numbers = st.floats(-10, 10).map(lambda x: round(x, 3))
some_strata = st.lists(st.lists(numbers, min_size=2, max_size=6), min_size=1, max_size=4)
FAR_APART = [[0.0, 0.1, 0.5], [10.0, 10.3, 11.0]]
TINY = {"far apart": FAR_APART, "one": [[0.2, 0.9, 0.4, 0.4]], "uneven": [[1.0, 2.0], [0.0, 5.0, 1.5, 1.0]]}


def bounds(found: Interval) -> tuple[float, float]:
    return found.low, found.high


# ---- the bootstrap ----


def enumerated(strata: list[list[float]], statistic) -> np.ndarray:
    """The statistic of every resample there is, each as likely as any other."""
    each = [list(product(values, repeat=len(values))) for values in strata]
    return np.array([statistic([x for part in parts for x in part]) for parts in product(*each)])


def assert_quantile(found: float, everything: np.ndarray, share: float, resamples: int) -> None:
    """That `found` cuts off `share` of the exact distribution, within four standard errors of the resampling."""
    error = 4 * math.sqrt(share * (1 - share) / resamples)
    tie = 1e-9
    assert (everything < found - tie).mean() <= share + error
    assert (everything <= found + tie).mean() >= share - error


@each_pair("name, level, statistic", [*TINY], [0.95, 0.5], [iqm, np.mean, np.median])
def test_bounds_are_those_of_all_resamples(name: str, level: float, statistic):
    strata = TINY[name]
    found = stratified_interval(strata, statistic, level, resamples=20_000, seed=3)
    assert found.value == pytest.approx(float(statistic(np.concatenate(strata))))
    everything = enumerated(strata, statistic)
    assert_quantile(found.low, everything, (1 - level) / 2, 20_000)
    assert_quantile(found.high, everything, (1 + level) / 2, 20_000)


def test_strata_are_resampled_within():
    """Resampled across, the mean of these would vary by several units; within, it cannot leave [5.0, 5.75]."""
    found = stratified_interval(FAR_APART, np.mean)
    assert 5.0 <= found.low < found.high <= 5.75


@given(strata=some_strata, permutation=st.randoms(use_true_random=False))
def test_order_does_not_matter(strata: list[list[float]], permutation):
    before = stratified_interval(strata, resamples=200)
    shuffled = [permutation.sample(values, len(values)) for values in strata]
    permutation.shuffle(shuffled)
    after = stratified_interval(shuffled, resamples=200)
    assert (bounds(before), before.n) == (bounds(after), after.n)
    assert before.value == pytest.approx(after.value, abs=1e-12)


@given(strata=some_strata, scale=st.floats(0.1, 10), shift=st.floats(-5, 5), statistic=st.sampled_from([iqm, np.mean]))
def test_scale_and_shift_pass_through(strata: list[list[float]], scale: float, shift: float, statistic):
    assume(len({tuple(sorted(s)) for s in strata}) == len(strata))
    before = stratified_interval(strata, statistic, resamples=200)
    after = stratified_interval([[scale * x + shift for x in s] for s in strata], statistic, resamples=200)
    for name in ("value", "low", "high"):
        assert getattr(after, name) == pytest.approx(scale * getattr(before, name) + shift, abs=1e-6), name


@given(strata=some_strata)
def test_the_same_seed_gives_the_same_interval_another_seed_another(strata: list[list[float]]):
    assert stratified_interval(strata, resamples=100) == stratified_interval(strata, resamples=100)
    wide = [[0.0, 1.0, 3.0, 7.0, 15.0]]
    assert len({stratified_interval(wide, resamples=30, seed=i).low for i in range(5)}) > 1
    assert stratified_interval(wide, resamples=10) != stratified_interval(wide, resamples=500)


@given(strata=some_strata)
def test_a_higher_level_is_no_narrower_and_the_value_lies_inside_what_was_seen(strata: list[list[float]]):
    inner, outer = (stratified_interval(strata, np.mean, level, resamples=400) for level in (0.5, 0.99))
    assert outer.low <= inner.low <= inner.high <= outer.high
    assert min(map(min, strata)) - 1e-9 <= outer.low and outer.high <= max(map(max, strata)) + 1e-9


@pytest.mark.parametrize("make", [stratified_interval, t_interval], ids=["bootstrap", "t"])
def test_no_bounds_where_values_do_not_say_how_they_vary(make):
    for strata, value, n in (([[0.3]], 0.3, 1), ([[0.3], [0.5]], 0.4, 2), ([[0.3], [0.2, 0.4]], 0.3, 3)):
        found = make(strata)
        assert (found.value, found.n) == (pytest.approx(value), n)
        assert math.isnan(found.low) and math.isnan(found.high)
    for strata in ([], [[], []]):
        found = make(strata)
        assert found.n == 0 and math.isnan(found.value) and math.isnan(found.low)
    assert make([[0.1, 0.1, 0.1]]) == Interval(make([[0.1, 0.1, 0.1]]).value, *[pytest.approx(0.1)] * 2, 3)
    assert bounds(make([[], [1.0, 1.0]])) == (1.0, 1.0)
    one_varies = make([[1.0, 1.0], [0.0, 2.0]])
    assert one_varies.low < one_varies.high


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(wrong: float):
    for ask in (
        lambda: stratified_interval([[1.0, wrong]]),
        lambda: t_interval([[1.0, wrong]]),
        lambda: paired_difference({"x": {0: wrong}}, {"x": {0: 1.0}}),
        lambda: probability_of_improvement([[1.0]], [[wrong]]),
        lambda: probability_of_improvement([[wrong]], [[1.0]]),
        lambda: area_under_curve([0], [wrong]),
        lambda: steps_to([0, 1], [wrong, 1.0], 0.5),
    ):
        with pytest.raises(InputError, match="must be finite"):
            ask()


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_a_level_that_is_none_is_refused(level: float):
    for ask in (stratified_interval, t_interval):
        with pytest.raises(InputError, match="level"):
            ask([[1.0, 2.0]], level=level)
    with pytest.raises(InputError, match="level"):
        rate([True], level)


@given(values=st.lists(numbers, min_size=1, max_size=25))
def test_iqm_drops_a_quarter_of_the_values_at_each_end(values: list[float]):
    cut = len(values) // 4
    assert float(iqm(values)) == pytest.approx(np.mean(sorted(values)[cut : len(values) - cut]), abs=1e-12)
    assert iqm([values, values], axis=1) == pytest.approx([float(iqm(values))] * 2)


@given(values=st.lists(numbers, min_size=2, max_size=8, unique=True), level=st.sampled_from([0.8, 0.95]))
def test_t_interval_of_one_stratum_is_scipys(values: list[float], level: float):
    wanted = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    found = t_interval([values], level)
    assert bounds(found) == pytest.approx((wanted.low, wanted.high), rel=1e-9, abs=1e-9)


def test_t_interval_of_two_strata_is_welchs():
    """(mean of a + mean of b) / 2 has half the standard error of Welch's difference, and its degrees of freedom."""
    a, b = [0.1, 0.5, 0.4, 0.9], [3.0, 3.1, 3.3, 2.0]
    welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    found = t_interval([a, b])
    assert found.high - found.low == pytest.approx((welch.high - welch.low) / 2)
    assert found.value == pytest.approx((np.mean(a) + np.mean(b)) / 2)


# ---- comparisons ----


def test_pairs_are_matched_by_stratum_and_seed():
    a = {"x": {2: 5.0, 0: 1.0, 1: 2.0}, "y": {0: 10.0, 1: 20.0}, "only a": {0: 1.0}}
    b = {"y": {1: 19.5, 0: 8.0, 7: 0.0}, "x": {1: 1.0, 0: 1.5, 2: 3.0}, "only b": {0: 1.0}}
    found = paired_difference(a, b, 0.9, resamples=100, seed=3)
    differences = [[-0.5, 1.0, 2.0], [2.0, 0.5]]
    assert found.left_out == 3  # "only a", "only b", and seed 7
    assert found.bootstrap == stratified_interval(differences, np.mean, 0.9, resamples=100, seed=3)
    assert found.t == t_interval(differences, 0.9)
    assert found.bootstrap.value == 1.0


@given(noise=st.lists(numbers, min_size=3, max_size=6), gain=st.lists(st.floats(0.1, 0.2), min_size=6, max_size=6))
def test_what_a_seed_brings_to_both_cancels(noise: list[float], gain: list[float]):
    b = {"x": dict(enumerate(noise))}
    a = {"x": {i: value + gain[i] for i, value in b["x"].items()}}
    found = paired_difference(a, b, resamples=200).bootstrap
    assert 0.1 - 1e-9 <= found.low <= found.high <= 0.2 + 1e-9
    other = paired_difference(b, a, resamples=200).bootstrap
    assert other.value == pytest.approx(-found.value)


def test_nothing_in_common_is_nothing_said():
    found = paired_difference({"x": {0: 1.0}}, {"x": {1: 1.0}})
    assert (found.bootstrap.n, found.t.n, found.left_out) == (0, 0, 2) and math.isnan(found.t.value)


@given(a=some_strata, seed=st.integers(0, 99))
def test_probability_of_improvement_is_mann_whitneys(a: list[list[float]], seed: int):
    generator = np.random.default_rng(seed)
    b = [[*generator.choice(values, len(values)), *generator.normal(size=2)] for values in a]
    wanted = np.mean([stats.mannwhitneyu(x, y).statistic / len(x) / len(y) for x, y in zip(a, b, strict=True)])
    found = probability_of_improvement(a, b, resamples=100)
    assert found.value == pytest.approx(float(wanted))
    assert 0 <= found.low <= found.high <= 1
    assert probability_of_improvement(b, a, resamples=100).value == pytest.approx(1 - found.value)
    assert found.n == sum(map(len, a + b))
    assert probability_of_improvement(a[::-1], b[::-1], resamples=100) == found


def test_bounds_of_improvement_are_those_of_all_resamples():
    a, b = [[0.1, 0.4, 0.9]], [[0.2, 0.3, 0.5]]
    found = probability_of_improvement(a, b, resamples=20_000)
    each = product(product(a[0], repeat=3), product(b[0], repeat=3))
    everything = np.array([np.mean([(x > y) + (x == y) / 2 for x in xs for y in ys]) for xs, ys in each])
    assert_quantile(found.low, everything, 0.025, 20_000)
    assert_quantile(found.high, everything, 0.975, 20_000)


def test_improvement_needs_the_same_strata():
    for a, b in (([[1.0]], []), ([[1.0], []], [[1.0], [2.0]])):
        with pytest.raises(InputError, match="strata"):
            probability_of_improvement(a, b)


@given(flags=st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_rate_has_clopper_and_pearsons_interval(flags: list[bool]):
    found = rate(flags)
    k, n = sum(flags), len(flags)
    assert (found.value, found.n) == (k / n, n)
    low = stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0
    high = stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
    assert bounds(found) == pytest.approx((low, high), abs=1e-9)


def test_a_rate_of_nothing_is_none():
    assert rate([]).n == 0 and math.isnan(rate([]).value)


# ---- curves ----

curves = st.lists(st.tuples(st.integers(1, 5), numbers), min_size=1, max_size=12).map(
    lambda rows: (np.cumsum([gap for gap, _ in rows]).tolist(), [value for _, value in rows])
)


@given(curve=curves, stretch=st.integers(1, 4), shift=st.floats(-3, 3))
def test_area_is_a_mean_whatever_the_unit_of_steps(curve, stretch: int, shift: float):
    steps, values = curve
    area = area_under_curve(steps, values)
    assert min(values) - 1e-9 <= area <= max(values) + 1e-9
    assert area_under_curve([stretch * s for s in steps], [v + shift for v in values]) == pytest.approx(area + shift)
    fine = np.linspace(steps[0], steps[-1], 20_001)
    assert area == pytest.approx(np.interp(fine, steps, values).mean(), abs=0.02)


@given(curve=curves, threshold=numbers)
def test_the_first_step_at_a_threshold(curve, threshold: float):
    steps, values = curve
    found = steps_to(steps, values, threshold)
    if max(values) < threshold:
        assert found is None
        return
    assert np.interp(found, steps, values) >= threshold - 1e-9
    before = np.linspace(steps[0], found, 200)[:-1]
    if found > steps[0]:
        assert (np.interp(before, steps, values) < threshold + 1e-9).all()


@pytest.mark.parametrize("steps", [[], [0, 1], [0, 0, 1], [2, 1, 3]])
def test_what_is_not_a_curve_is_refused(steps: list[float]):
    for ask in (area_under_curve, lambda s, v: steps_to(s, v, 0.0)):
        with pytest.raises(InputError, match="curve"):
            ask(steps, [1.0, 2.0, 3.0])


@given(values=st.lists(numbers, min_size=1, max_size=20), width=st.integers(1, 22))
def test_smoothed_is_a_convolution(values: list[float], width: int):
    wanted = np.convolve(values, np.ones(width) / width, "valid") if width <= len(values) else []
    assert smoothed(values, width) == pytest.approx(list(wanted), abs=1e-9)


# ---- what the intervals are worth ----


def table() -> list[tuple[str, str, int, int, float]]:
    """The document's measured coverages: interval, distribution, strata, seeds, share; none without documents."""
    text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    rows = re.findall(r"^\| ([^|]+) \| (\w+) \| (\d+) \| (.+) \|$", text, flags=re.M)
    return [
        (interval, distribution, int(strata), seeds, float(share.rstrip(" %")) / 100)
        for interval, distribution, strata, shares in rows
        for seeds, share in zip((3, 5, 10), shares.split("|"), strict=True)
    ]


def test_the_document_has_every_case():
    assert {row[:3] for row in table()} == set(product(INTERVALS, DISTRIBUTIONS, (1, 4)))


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "distribution", "strata", "seeds", "share"), table())
def test_the_document_says_what_is_measured(interval: str, distribution: str, strata: int, seeds: int, share: float):
    assert coverage(interval, distribution, seeds, strata).value == pytest.approx(share, abs=0.0051)


def test_with_three_seeds_the_bootstrap_undercovers_and_student_does_not():
    """Enough repeats to tell; the document has the figures."""
    assert coverage("mean, bootstrap", "normal", seeds=3, repeats=300).high < 0.85
    found = coverage("mean, t", "normal", seeds=3, repeats=1000)
    assert found.low < 0.95 < found.high


def test_one_seed_has_no_coverage():
    with pytest.raises(InputError, match="seeds=1"):
        coverage("mean, t", "normal", seeds=1)
