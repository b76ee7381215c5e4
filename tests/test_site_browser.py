"""The documentation's site in a real browser, opened from a disk."""

from pathlib import Path

import pytest

from browsing import MARKS, launched
from test_site import build_site

pytestmark = [*MARKS, pytest.mark.slow]


def test_the_search_finds_pages_from_a_disk(tmp_path: Path):
    start = build_site(tmp_path) / "guides" / "own_task.html"
    asked: list[str] = []
    with launched() as chromium:
        page = chromium.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(start.as_uri())
        page.keyboard.press("/")
        page.keyboard.type("explained variance")
        page.locator(".md-search-result__item").first.wait_for(timeout=30_000)
    assert asked and all(url.startswith("file:") for url in asked), asked
