"""Mistakes in a comparison's page: numbers that are not the analysis', bands that flatter, links that lead nowhere."""

from planted import Bug

PAGE = "tests/test_comparison_report.py::"

BUGS = (
    Bug(
        19,
        "a difference is the wrong way round",
        "lab/analysis.py",
        "[[a.final[seed] - b.final[seed] for seed",
        "[[b.final[seed] - a.final[seed] for seed",
        (f"{PAGE}test_differences_are_seed_by_seed_from_the_first_objective",),
    ),
    Bug(
        19,
        "a band is made from the spread of the population, not of the sample",
        "report/bands.py",
        "np.nansum((values - mean) ** 2, 0) / (n - 1)",
        "np.nansum((values - mean) ** 2, 0) / n",
        (f"{PAGE}test_bands_know_only_the_seeds_that_are_there",),
    ),
    Bug(
        19,
        "a diverged run's reward ends with it instead of counting 0",
        "report/comparison_plots.py",
        "values = over_seeds([cell.rewards for cell in cells],",
        'values = over_seeds([cell.series["reward_mean"] for cell in cells],',
        (f"{PAGE}test_a_diverged_cells_metrics_end_and_its_reward_is_0",),
    ),
    Bug(
        20,
        "a link to a cell is relative to the comparison, wherever the page is",
        "report/comparison_page.py",
        "os.path.relpath(own / REPORT, start)",
        "os.path.relpath(own / REPORT, folder)",
        (f"{PAGE}test_a_cells_own_page_is_linked_from_wherever_the_report_is",),
    ),
)
