"""Draw the pictures of docs/report.md from a run's report, in light and dark, or from a comparison's, in light; where
episodes are in an environment, the conversation of docs/agents.md.

    python docs/screenshots.py RUN/report.html [--out docs/figures]
    python docs/screenshots.py COMPARISON/report.html

Needs playwright and the system's Chromium (apt-get install chromium).
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

WINDOW = {"width": 1280, "height": 940}
MOST_BYTES = 300_000


def at_the_top(page: Any) -> None:
    """The header and the first curves."""
    go_to(page, None)


def in_the_plane(page: Any) -> None:
    """Where the tokens lie, and where regions end."""
    go_to(page, "region")


def at_a_token(page: Any) -> None:
    """The browser, pointing at a token that is pulled back in a completion of some length."""
    go_to(page, "rollouts")
    page.select_option("#kind", "masked")
    rows = page.locator(".row").all()
    longest = max(rows, key=lambda row: len(row.locator(".snippet").inner_text()))
    longest.click()
    go_to(page, "rollouts")
    page.locator("#view .token.masked").first.hover()


def in_a_conversation(page: Any) -> None:
    """The browser, showing the first episode of three turns or more that has a gradient and earned a reward."""
    go_to(page, "rollouts")
    for row in page.locator(".row").all():
        row.click()
        chips = page.locator("#view .chips").inner_text()
        turns, shaded = page.locator("#view .sampled").count(), page.locator("#view .token[class*=up-]").count()
        if turns >= 3 and shaded and "reward 1" in chips:
            break
    page.locator("#view").evaluate("view => { view.scrollIntoView({behavior: 'instant'}); view.scrollTop = 1e6; }")
    page.mouse.move(0, 0)


def of_a_comparison(page: Any) -> None:
    """Rewards, and where each objective ends."""
    page.set_viewport_size({"width": 1280, "height": 1565})
    go_to(page, None)


VIEWS = {"top": at_the_top, "region": in_the_plane, "rollouts": at_a_token}


VIEWS_OF_EPISODES = {"conversation": in_a_conversation}
VIEWS_OF_A_COMPARISON = {"comparison": of_a_comparison}


def go_to(page: Any, section: str | None) -> None:
    """Scroll to a section, or to the top."""
    there = "scrollTo({top: 0, behavior: 'instant'})"
    if section:
        there = f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})"
    page.evaluate(there)


def main() -> None:
    """Write a picture of each view in each colour scheme."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    options = parser.parse_args()
    chromium = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    if chromium is None:
        parser.error("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport=WINDOW, color_scheme=scheme)
            page.goto(options.report.resolve().as_uri())
            page.wait_for_selector("html[data-drawn]", state="attached")
            compared = page.locator("#differences").count() > 0
            if compared and scheme == "dark":
                continue
            talks = not compared and page.locator("#view .bubble").count() > 0
            views = VIEWS_OF_A_COMPARISON if compared else VIEWS_OF_EPISODES if talks else VIEWS
            for name, view in views.items():
                view(page)
                path = options.out / f"report-{name}-{scheme}.png"
                page.screenshot(path=path)
                size = path.stat().st_size
                print(f"{path}: {size / 1000:.0f} kB{' TOO LARGE' if size > MOST_BYTES else ''}")


if __name__ == "__main__":
    main()
