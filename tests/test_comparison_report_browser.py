"""The page of a comparison in a real browser, headless, with no network."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from browsing import MARKS, Visit, launched, open_report
from drpo.lab.analysis import best, conditions, difference
from drpo.lab.outcome import Comparison
from drpo.report.comparison_page import write_comparison_report
from hand_comparison import OBJECTIVES, large

pytestmark = MARKS

SECTIONS = ("reward", "ends", "differences", "sweep", "metrics")
LIMIT_MB = 15
LIMIT_S = 2.0
SLOW_MACHINE = 5.0
"""How much slower than it should be this machine may be."""


@pytest.fixture(scope="module")
def made() -> Comparison:
    return large()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, made: Comparison, chromium: Any) -> Visit:
    """300 cells."""
    path = write_comparison_report(tmp_path_factory.mktemp("large"), made)
    assert path.stat().st_size / 1e6 < LIMIT_MB
    return open_report(chromium, path, Visit)


@pytest.fixture
def page(opened: Visit) -> Iterator[Any]:
    yield opened.page
    opened.check()


def lines(page: Any, section: str) -> int:
    """How many lines the first plot of a section has."""
    return page.locator(f"#{section} .plot").first.locator(".scatterlayer .trace").count()


def until(page: Any, section: str, n: int) -> None:
    deadline = time.monotonic() + 30
    while lines(page, section) != n and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lines(page, section) == n


def column(page: Any, table: str, i: int) -> list[str]:
    return page.locator(f"{table} tbody tr td:nth-child({i})").all_inner_texts()


def test_three_hundred_cells_open_quickly_and_all_is_drawn(opened: Visit, page: Any, capsys: pytest.CaptureFixture):
    ready = page.evaluate("performance.getEntriesByName('ready')[0].startTime") / 1000
    with capsys.disabled():
        print(f"\n300 cells: opened in {ready:.2f} s")
    assert page.inner_text("#results") == "300 of 300" and "drpo(12.5)" in page.inner_text("#caution")
    opened.draw_all(SECTIONS)
    assert page.locator(".plot").count() == 5 * len(SECTIONS) + 6
    assert all(len(plot.get_attribute("aria-label")) > 20 for plot in page.locator(".plot").all())
    assert ready < LIMIT_S * SLOW_MACHINE


def test_an_objective_is_switched_off_in_every_plot(page: Any):
    button = page.locator("#objectives button").nth(3)
    until(page, "reward", 12)  # a band and a line each
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    for section, n in (("reward", 10), ("ends", 10), ("sweep", 5), ("metrics", 10), ("differences", 4)):
        until(page, section, n)
        assert "dppo" not in page.locator(f"#{section} .plot").first.get_attribute("aria-label")
    page.keyboard.press("Enter")
    until(page, "reward", 12)
    page.check("#every-seed")
    until(page, "reward", 12 + 6 * 5)
    page.uncheck("#every-seed")
    page.uncheck("#bands")
    until(page, "reward", 6)
    page.check("#bands")


def test_the_reference_changes_the_differences(page: Any, made: Comparison):
    chosen = [c for c in best(conditions(made)) if c.regime == (1,)]
    for reference in (chosen[0], chosen[5]):
        page.select_option("#reference", label=reference.objective)
        shown = dict(
            zip(column(page, "#differences-table", 2)[:5], column(page, "#differences-table", 3)[:5], strict=True)
        )
        for c in chosen:
            if c is not reference:
                wanted = f"{difference(c, reference).value:.3f}".replace("-", "\u2212")
                assert shown[c.objective] == wanted, c.objective
        assert reference.objective not in shown


def test_tables_sort_by_mouse_and_by_keyboard(page: Any):
    table = "#ends-tables .card:first-child"
    head = page.locator(f"{table} thead th").nth(3)
    head.locator("button").click()
    rising = [float(x) for x in column(page, table, 4)]
    assert head.get_attribute("aria-sort") == "ascending" and rising == sorted(rising) and len(set(rising)) > 6
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert [float(x) for x in column(page, table, 4)] == rising[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    marked = page.locator(f"{table} tr:has(.badge) td:first-child").all_inner_texts()
    assert sorted(text.split("best rate")[0].strip() for text in marked) == sorted(OBJECTIVES)


def test_metrics_are_chosen_and_a_narrow_window_needs_no_sideways_scrolling(page: Any):
    for metric in page.locator("#metric option").all():
        page.select_option("#metric", metric.get_attribute("value"))
    assert "truncated" in page.locator("#metrics .plot").first.get_attribute("aria-label")
    for width in (700, 380, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_script_in_a_name_is_text(tmp_path: Path, made: Comparison, chromium: Any):
    nasty = "<img src=x onerror=alert(1)>"
    changed = {"objective": nasty, "task": nasty}
    cells = [replace(c, config={**c.config, **changed}, reason=nasty) for c in made.cells[:12]]
    found = open_report(chromium, write_comparison_report(tmp_path, Comparison(nasty, tuple(cells), {})), Visit)
    found.draw_all(SECTIONS)
    assert found.page.locator("img").count() == 0 and nasty in found.page.inner_text("#objectives")
    found.check()
