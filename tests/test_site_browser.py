"""The documentation's site in a real browser, as wide as a phone and as a screen, light and dark."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.browsing import MARKS, launched
from support.documentation import CONFIG, DOCS, LINKS, build_site, pages

pytestmark = MARKS

SIZES = {"phone": {"width": 390, "height": 844}, "screen": {"width": 1280, "height": 900}}
BEYOND = """[...document.querySelectorAll('.md-content *')]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.md-typeset__scrollwrap, pre'))
  .map((e) => e.tagName + ' ' + e.innerText.slice(0, 60))"""
"""What reaches beyond the window; tables and blocks of code scroll by themselves."""
BACKGROUND = "getComputedStyle(document.querySelector('[data-md-color-scheme]')).backgroundColor"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"))


@pytest.mark.parametrize("size", SIZES)
def test_no_page_is_wider_than_the_window(site: Path, chromium: Any, size: str) -> None:
    named = [page.removesuffix(".md") + ".html" for page in pages(LINKS.expanded(CONFIG["nav"], DOCS))]
    context = chromium.new_context(viewport=SIZES[size])
    page, beyond = context.new_page(), {}
    for name in named:
        page.goto((site / name).as_uri())
        if page.evaluate("document.documentElement.scrollWidth") > SIZES[size]["width"] or page.evaluate(BEYOND):
            beyond[name] = page.evaluate(BEYOND)
    context.close()
    assert len(named) > 60 and beyond == {}


def test_the_site_follows_the_systems_colours(site: Path, chromium: Any) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        context = chromium.new_context(viewport=SIZES["phone"], color_scheme=scheme)
        page = context.new_page()
        page.goto((site / "index.html").as_uri())
        seen[scheme] = page.evaluate(BACKGROUND)
        context.close()
    light, dark = (sum(map(int, seen[s].removeprefix("rgb(").removesuffix(")").split(","))) for s in ("light", "dark"))
    assert light > 600 and dark < 200, seen
