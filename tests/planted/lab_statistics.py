"""Mistakes in what is said of several seeds: too sure, or of the wrong thing."""

from planted import Bug

T = "tests/test_statistics.py::"
WITHIN = f"{T}test_strata_are_resampled_within"
EVERY = f"{T}test_bounds_are_those_of_all_resamples"
FILE, CURVES = "lab/statistics.py", "lab/curves.py"

BUGS = (
    Bug(
        19,
        "seeds of all strata are resampled together",
        FILE,
        "return _bootstrap([np.array(part) for part in parts], _pooled(statistic)",
        "return _bootstrap([np.concatenate(parts)] if parts else [], _pooled(statistic)",
        (WITHIN, EVERY),
    ),
    Bug(
        19,
        "the statistic of strata is a mean of their statistics",
        FILE,
        "return lambda *parts, axis: statistic(np.concatenate(parts, axis=axis), axis=axis)",
        "return lambda *parts, axis: np.mean([statistic(part, axis=axis) for part in parts], axis=0)",
        (EVERY,),
    ),
    Bug(
        19,
        "a single seed has an interval of no width",
        FILE,
        """    value = float(statistic(*parts, axis=-1)) if parts else math.nan
    if min(map(len, parts), default=0) < 2:""",
        """    value = float(statistic(*parts, axis=-1)) if parts else math.nan
    if not parts:""",
        (f"{T}test_no_bounds_where_values_do_not_say_how_they_vary",),
    ),
    Bug(
        19,
        "the interval depends on the order of the seeds",
        FILE,
        "return sorted(float(value) for value in values)",
        "return [float(value) for value in values]",
        (f"{T}test_order_does_not_matter",),
    ),
    Bug(
        19,
        "half of the values are cut, not a quarter at each end",
        FILE,
        "proportiontocut=0.25",
        "proportiontocut=0.125",
        (f"{T}test_iqm_drops_a_quarter_of_the_values_at_each_end",),
    ),
    Bug(
        19,
        "Student's interval with the normal's quantile",
        FILE,
        "stats.t.ppf((1 + level) / 2, freedom)",
        "stats.norm.ppf((1 + level) / 2)",
        (f"{T}test_t_interval_of_one_stratum_is_scipys", f"{T}test_t_interval_of_two_strata_is_welchs"),
    ),
    Bug(
        19,
        "the variance of few values divided by their number",
        FILE,
        "part.var(ddof=1)",
        "part.var()",
        (f"{T}test_t_interval_of_one_stratum_is_scipys",),
    ),
    Bug(
        19,
        "differences pair values by position",
        FILE,
        "[a[name][s] - b[name][s] for s in seeds]",
        "[x - y for x, y in zip(a[name].values(), b[name].values())]",
        (f"{T}test_pairs_are_matched_by_stratum_and_seed",),
    ),
    Bug(
        19,
        "equal values count as an improvement",
        FILE,
        "((x > y) + (x == y) / 2)",
        "((x >= y) + 0.0)",
        (f"{T}test_probability_of_improvement_is_mann_whitneys",),
    ),
    Bug(
        19,
        "an interval that is not known supports a claim",
        FILE,
        "return a.high < b.low or b.high < a.low",
        "return not (a.high >= b.low and b.high >= a.low)",
        (f"{T}test_disjoint_is_no_claim_where_intervals_touch_or_are_unknown",),
    ),
    Bug(
        19,
        "the area under a curve takes its points as equally far apart",
        CURVES,
        "float(trapezoid(values, steps)) / (steps[-1] - steps[0])",
        "float(trapezoid(values)) / (len(steps) - 1)",
        (f"{T}test_area_is_a_mean_whatever_the_unit_of_steps",),
    ),
    Bug(
        19,
        "a collapse is measured from 0 where rewards are negative",
        CURVES,
        "curve[-1] - low, max(curve) - low",
        "curve[-1], max(curve)",
        (f"{T}test_collapse",),
    ),
    Bug(
        19,
        "one bad step is a collapse",
        CURVES,
        "smoothed(rewards, max(3, len(rewards) // 8))",
        "smoothed(rewards, 1)",
        (f"{T}test_collapse", f"{T}test_a_long_curve_is_smoothed_over_an_eighth"),
    ),
    Bug(
        19,
        "tiny variances are squared to 0",
        FILE,
        "freedom = 1 / sum((v / total) ** 2 / (len(p) - 1)",
        "freedom = total**2 / sum(v**2 / (len(p) - 1)",
        ("tests/test_lab.py::test_nothing_is_claimed_where_intervals_overlap",),
    ),
)
