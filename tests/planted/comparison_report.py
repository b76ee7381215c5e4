"""Mistakes in a comparison's page: numbers that are not the analysis', bands that flatter, links that lead nowhere."""

from planted import Bug

PAGE = "tests/test_comparison_report.py::"
BROWSER = "tests/test_comparison_report_browser.py::"

BUGS = (
    Bug(
        19,
        "a difference is the wrong way round",
        "lab/analysis.py",
        "[[a.final[seed] - b.final[seed] for seed",
        "[[b.final[seed] - a.final[seed] for seed",
        (f"{PAGE}test_the_pages_numbers_are_those_of_the_analysis",),
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
        "report/comparison_data.py",
        "rewards = over_seeds([cell.rewards for cell in cells], n_steps)",
        'rewards = over_seeds([cell.series["reward_mean"] for cell in cells], n_steps)',
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
    Bug(
        19,
        "the page sorts numbers as text",
        "report/page/sortable.js",
        'typeof a === "number" && typeof b === "number" ? a - b',
        'typeof a === "number" && typeof b === "number" ? String(b).localeCompare(String(a))',
        (f"{BROWSER}test_tables_sort_by_mouse_and_by_keyboard",),
    ),
)
