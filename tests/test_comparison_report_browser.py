"""The page of a comparison in a real browser, headless, with no network."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drpo.lab.trial_result import Comparison
from drpo.report.comparison_page import write_comparison_report
from support.browsing import MARKS, Visit, launched, open_report
from support.hand_comparison import large

pytestmark = MARKS

LIMIT_MB = 15
TABLES_BEYOND_CARD = """[...document.querySelectorAll("table")]
  .filter((table) => table.getBoundingClientRect().width > table.parentElement.clientWidth + 0.5)
  .map((table) => table.innerText.slice(0, 80))"""
BROKEN_HEADINGS = """[...document.querySelectorAll("thead th")].filter((heading) => {
    const range = document.createRange();
    range.selectNodeContents(heading);
    const lines = new Set([...range.getClientRects()].map((box) => box.top)).size;
    return lines > heading.innerText.split(/\\s+/).length;
  }).map((heading) => heading.innerText)"""
"""Headings of more lines than words."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with launched() as browser:
        yield browser


def test_three_hundred_trials_are_drawn_on_a_screen_and_on_paper(tmp_path: Path, chromium: Any):
    path = write_comparison_report(tmp_path, large())
    assert path.stat().st_size / 1e6 < LIMIT_MB
    found = open_report(chromium, path, Visit)
    page = found.page
    assert page.inner_text("#result") == "300 of 300" and "drpo(12.5)" in page.inner_text("#caution")
    found.draw_all()
    charts = found.charts()
    assert len(charts) == 12 and all(right <= 0.5 and below <= 0.5 for _, right, below in charts)
    lines = page.locator("#reward-plot .scatterlayer .trace")
    assert lines.count() == 2 * 6 * 5  # a band and a mean for each objective and regime
    page.locator("#reward-plot .legendtoggle").nth(3).click()  # one objective, in every facet
    page.wait_for_timeout(1500)  # plotly waits for a second click
    assert lines.count() == 2 * 5 * 5
    for width in (1280, 700, 380):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1200, "height": 900})
    assert page.evaluate(TABLES_BEYOND_CARD) == []
    assert page.evaluate(BROKEN_HEADINGS) == []
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_timeout(500)
    found.on_paper()
    assert all(right <= 0.5 for _, right, _ in found.charts())
    assert page.evaluate(TABLES_BEYOND_CARD) == []
    found.check()


def test_a_script_in_a_name_is_text(tmp_path: Path, chromium: Any):
    nasty = "<img src=x onerror=alert(1)>"
    changed = {"objective": nasty, "task": nasty}
    trials = [replace(c, config={**c.config, **changed}, reason=nasty) for c in large().trials[:12]]
    found = open_report(chromium, write_comparison_report(tmp_path, Comparison(nasty, tuple(trials), {})), Visit)
    found.draw_all()
    assert found.page.locator("img").count() == 0
    assert nasty in found.page.locator("#ends-plot .ytick").first.text_content()
    found.check()
