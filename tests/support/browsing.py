"""A report in a real browser, headless, with no network."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]
WINDOW = {"width": 1280, "height": 900}
PATIENCE_MS = 180_000
"""How long a busy machine may take to draw."""


class Visit:
    """A page that is open, with all that went wrong in it.

    Args:
        page: playwright's.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))

    def check(self) -> None:
        """Nothing went wrong, and nothing but the file was asked for."""
        assert self.errors == []
        assert [r for r in self.requests if not r.startswith(("data:", "blob:"))] == [self.page.url]

    def draw_all(self) -> None:
        """Wait until all figures are drawn, without scrolling to them."""
        self.page.wait_for_selector("html[data-drawn]", state="attached", timeout=PATIENCE_MS)

    def charts(self) -> list[tuple[str, float, float]]:
        """Of each figure its id, and how far its picture reaches beyond its element, to the right and below."""
        return self.page.evaluate(
            """[...document.querySelectorAll(".chart")].map((chart) => {
              const [outer, inner] = [chart, chart.querySelector(".main-svg")].map((e) => e.getBoundingClientRect());
              return [chart.id, inner.right - outer.right, inner.bottom - outer.bottom];
            })"""
        )

    def on_paper(self) -> None:
        """Show the page as it is printed on A4."""
        self.page.emulate_media(media="print", color_scheme="dark")
        self.page.set_viewport_size({"width": 703, "height": 1000})


V = TypeVar("V", bound=Visit)


@contextmanager
def launched() -> Iterator[Any]:
    """The system's Chromium."""
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


def open_report(chromium: Any, report: Path, kind: Callable[[Any], V]) -> V:
    """Open a report where nothing but files can be reached."""
    context = chromium.new_context(viewport=WINDOW, color_scheme="light")
    context.set_default_timeout(PATIENCE_MS)
    context.route(lambda url: not url.startswith(("file:", "data:", "blob:")), lambda route: route.abort())
    found = kind(context.new_page())
    found.page.goto(report.as_uri())
    found.page.wait_for_selector("html[data-ready], html[data-drawn]", state="attached")
    return found
