"""The page of a run in a real browser, headless, with no network."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from drpo.objectives import DRPO
from drpo.report.run_page import write_report
from drpo.train.config import load_run
from drpo.train.records import MODEL
from support.browsing import MARKS, WINDOW, Visit, launched, open_report
from support.hand_run import NASTY, RECORDS, conversation, record, write_run
from support.large_run import write_large_run

pytestmark = MARKS

LIMIT_MB = 15
LIMIT_S = 2.0
SLOW_MACHINE = 5.0
"""How much slower than it should be this machine may be."""


class RunVisit(Visit):
    """The page of a run."""

    def listed(self) -> list[int]:
        """The completions in the list's sight, by their place in the file."""
        return [int(row.get_attribute("data-rollout")) for row in self.page.locator(".row").all()]

    def chosen(self) -> int:
        return int(self.page.locator('.row[aria-selected="true"]').get_attribute("data-rollout"))

    def token(self, k: int) -> Any:
        return self.page.locator(f'#view .token[data-k="{k}"]')

    def numbers(self) -> dict[str, str]:
        """What the tooltip says."""
        rows = [row.inner_text().split("\t") for row in self.page.locator("#tooltip tr").all()]
        return {name.split(" ")[0]: value.strip() for name, value in rows}

    def clear(self) -> None:
        """Reset the controls; the page reads them when the browser has done so."""
        self.page.click("#filters button[type=reset]")
        self.page.evaluate("new Promise((resolve) => setTimeout(resolve))")

    def sort_by_step(self) -> None:
        self.page.select_option("#sort", "step")
        self.page.uncheck("#falling")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with launched() as browser:
        yield browser


Opener = Callable[[Path], RunVisit]


@pytest.fixture
def visit(chromium: Any) -> Iterator[Opener]:
    """Opens reports of a test's own."""
    visits: list[RunVisit] = []

    def opened(report: Path) -> RunVisit:
        visits.append(open_report(chromium, report, RunVisit))
        return visits[-1]

    yield opened
    for found in visits:
        found.check()
        found.page.context.close()


@pytest.fixture(scope="module")
def page_by_hand(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunVisit]:
    folder = tmp_path_factory.mktemp("by-hand")
    found = open_report(chromium, write_report(folder, write_run(folder)), RunVisit)
    yield found
    found.page.context.close()


@pytest.fixture
def found(page_by_hand: RunVisit) -> Iterator[RunVisit]:
    """The report of the run written by hand, open and as it was when it was opened."""
    page_by_hand.page.set_viewport_size(WINDOW)
    page_by_hand.page.emulate_media(media="screen", color_scheme="light")
    page_by_hand.page.mouse.move(2, 2)
    page_by_hand.clear()
    yield page_by_hand
    page_by_hand.check()


def test_it_says_what_ran_and_draws_every_figure_without_scrolling(found: RunVisit):
    page = found.page
    assert page.title() == "by-hand: drpo(0.2), seed 0" == page.inner_text("h1")
    assert page.inner_text("#result") == "25.0% \u2192 75.0%"
    assert "95 % interval 60.0% to 90.0%" in page.inner_text(".result")
    assert "an abacus" in page.inner_text("#summary") and page.locator("#caution").count() == 0
    found.draw_all()
    charts = found.charts()
    assert len(charts) >= 10 and all(right <= 0.5 and below <= 0.5 for _, right, below in charts)
    assert page.locator("#histogram .bars path").count() > 0 and page.locator("#scatter-log .point").count() == 8
    rows = page.locator("#configuration tr:visible")
    n_differing = rows.count()
    page.click("#configuration summary")
    assert rows.count() > n_differing > 1


def test_it_prints_on_a_sheet_in_ink(found: RunVisit):
    found.draw_all()
    found.on_paper()
    assert all(right <= 0.5 for _, right, _ in found.charts())
    assert found.page.evaluate("document.documentElement.scrollWidth") <= 703
    assert found.page.locator("nav").is_hidden() and found.page.locator("#filters").is_hidden()
    assert found.page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert found.page.pdf(format="A4").startswith(b"%PDF")


def test_a_radius_out_of_reach_is_said(visit: Opener, tmp_path: Path):
    run = write_run(tmp_path, objective=DRPO(12.5))
    page = visit(write_report(tmp_path, run)).page
    assert "no token can leave the region" in page.inner_text("#caution")
    assert "No token can reach the boundary of drpo(12.5)" in page.inner_text("#region")


def test_pointing_at_a_token_shows_its_numbers(found: RunVisit):
    found.sort_by_step()
    assert found.chosen() == found.listed()[0] == 0
    found.token(0).hover()
    assert found.page.inner_text("#tooltip .name") == f'"a" \u00b7 id {RECORDS[0]["token_ids"][0]}'
    assert found.numbers() == {
        "\u03bc": "0.400", "\u03c0": "0.500", "r": "1.25", "D": "0.100", "A": "0.5", "w": "0.500"
    }  # fmt: skip
    found.token(1).hover()
    assert found.numbers()["w"] == "\u22121.00" and found.numbers()["r"] == "5.00"
    assert found.page.inner_text("#tooltip .verdict") == "pulled back, out of the region"
    classes = [found.token(k).get_attribute("class") for k in range(4)]
    assert classes == ["token down-2", "token masked out-of-region", "token up-2", "token even special"]
    found.page.mouse.move(5, 5)
    assert found.page.locator("#tooltip").is_hidden()


def test_what_is_shown_is_what_was_recorded_to_the_last_digit(visit: Opener, tmp_path: Path):
    """For numbers between decimals, and at the ends of what a code can say."""
    mus, pis = [0.123456, 1e-7, 0.99951, 3.14159e-12, 1e-25], [0.234567, 5.5555e-9, 0.99949, 2.71828e-4, 1.5e-25]
    write_run(tmp_path, [record("abcd", mus, pis, advantage=-0.125)])
    found = visit(write_report(tmp_path, load_run(tmp_path)))
    for k, (mu, pi) in enumerate(zip(mus[:4], pis[:4], strict=True)):
        found.token(k).hover()
        numbers = found.numbers()
        capped = min(pi / mu, math.exp(20))
        for name, value in (("\u03bc", mu), ("\u03c0", pi), ("r", capped), ("D", pi - mu), ("w", 1 + (pi - mu) / 0.2)):
            assert float(numbers[name].replace("\u2212", "-")) == float(f"{value:.3g}"), (k, name)
        assert numbers["A"] == "\u22120.125"
    found.token(4).hover()
    assert (found.numbers()["\u03bc"], found.numbers()["r"]) == ("1.00e-25", "1.50")


def test_tokens_without_a_gradient_are_plain_and_it_is_said(found: RunVisit):
    found.sort_by_step()
    said = {}
    for i in (2, 3, 4):
        found.page.click(f'.row[data-rollout="{i}"]')
        assert {t.get_attribute("class") for t in found.page.locator("#view .token").all()} <= {
            "token",
            "token special",
        }
        found.token(0).hover()
        assert found.page.inner_text("#tooltip .verdict") == "no gradient" and "w" not in found.numbers()
        said[i] = found.page.inner_text("#view .state")
    assert "advantage is 0" in said[2] and said[2] == said[3] and "no reward" in said[4]
    assert "ValueError: no verdict" in found.page.inner_text("#view")


def test_a_script_in_a_completion_is_text(visit: Opener, tmp_path: Path):
    """Wherever text of others is shown; a token holds the whole script, and would run if it were read as HTML."""
    backend = Tokenizer(WordLevel({"<eos>": 0, NASTY: 1}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / MODEL)
    nasty = {"prompt": NASTY, "answer": NASTY, "text": NASTY, "failure": NASTY, "problem": NASTY, "token_ids": [1, 0]}
    run = write_run(tmp_path, [{**record("a", [0.5, 0.5], [0.5, 0.5], advantage=1.0), **nasty}])
    found = visit(write_report(tmp_path, run))
    found.page.fill("#search", "onerror")
    assert found.listed() == [0] and found.page.inner_text("#view .tokens") == f"{NASTY}<eos>"
    found.token(0).hover()
    assert "onerror" in found.page.inner_text("#tooltip .name")
    assert found.page.inner_text("#view").count(NASTY) == 5
    assert found.page.title() == "by-hand: drpo(0.2), seed 0"
    assert found.page.locator("#rollouts img, #rollouts script").count() == 0


@pytest.fixture(scope="module")
def talk_page(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunVisit]:
    folder = tmp_path_factory.mktemp("talk")
    long = {"role": "tool", "name": "search", "content": "x" * 400 + f"\n{NASTY}\x1b[2J"}
    call = {"type": "function", "function": {"name": NASTY, "arguments": {"q": "y" * 300}}}
    changed = conversation(sample=1, reward=None, failure="the server is gone", advantages=[0.5] * 6, step=2)
    changed["messages"][4:6] = [{"role": "assistant", "content": "ab", "tool_calls": [call]}, long]
    changed["played"] |= {"done": False, "failure": {"kind": "died", "text": "the server is gone"}}
    nothing = {"role": "user", "content": "3?"}
    unsaid = record("", 0.5, problem="none", step=3, finish_reason="length", reward=None, failure="no start")
    unsaid |= {"messages": [nothing], "turns": [], "played": {**changed["played"], "rewards": []}}
    for name in ("prompt_ids", "token_ids", "behavior_logp", "version", "update", "advantage"):
        del unsaid[name]
    found = open_report(chromium, write_report(folder, write_run(folder, [conversation(), changed, unsaid])), RunVisit)
    yield found
    found.page.context.close()


@pytest.fixture
def talk(talk_page: RunVisit) -> Iterator[RunVisit]:
    """The report of a run of conversations."""
    talk_page.page.set_viewport_size(WINDOW)
    talk_page.page.emulate_media(media="screen", color_scheme="light")
    talk_page.clear()
    talk_page.sort_by_step()
    yield talk_page
    talk_page.check()


def test_an_episode_of_several_turns_is_a_conversation(talk: RunVisit):
    page = talk.page
    assert (talk.listed(), talk.chosen()) == ([0, 1, 2], 0)
    bubbles = page.locator("#view .bubble")
    kinds = [b.get_attribute("class").removeprefix("bubble ") for b in bubbles.all()]
    sampled, user = "assistant sampled", "user"
    assert kinds == ["system", user, "assistant", user, sampled, "tool", sampled, user, sampled]
    heads = [" ".join(b.inner_text().split()) for b in page.locator("#view .who").all()]
    assert heads[2] == "assistant in the prompt" and heads[5] == "tool result of double"
    assert heads[4] == "assistant turn 1 3 tokens reward 0" and heads[6] == "assistant turn 2 3 tokens reward 0.5"
    assert "failed call" in heads[7] and sum("failed call" in head for head in heads) == 1
    assert bubbles.nth(4).locator(".call").inner_text() == 'calls double({"x": 2})'
    assert bubbles.nth(6).locator(".tokens").inner_text() == "cd<eos>" and bubbles.nth(7).locator(".token").count() == 0
    order = page.locator("#view .conversation > li").evaluate_all("all => all.map((e) => e.className.split(' ')[0])")
    assert order == ["bubble"] * 8 + ["branch", "bubble"]
    chips = [chip.inner_text() for chip in page.locator("#view .chips li").all()]
    assert chips[-5:] == ["3 turns", "ended by the environment", "1 call", "1 failed call", "1 branch"]
    assert page.locator("#view .chips .warn").count() == 2


def test_sampled_tokens_of_every_turn_have_their_numbers(talk: RunVisit):
    """As many as there are, in the order of the turns; those of a branch that was not trained have no gradient."""
    assert talk.page.locator("#view .token").count() == 8
    shades = [talk.token(k).get_attribute("class").split()[1] for k in (0, 1, 3, 4)]
    assert shades == ["down-2", "even", "up-3", "masked"]
    talk.token(0).hover()
    assert (talk.numbers()["A"], talk.numbers()["w"]) == ("0.5", "0.500")
    talk.token(4).hover()
    assert (talk.numbers()["A"], talk.numbers()["w"]) == ("0.25", "\u22120.500")
    talk.token(6).hover()
    assert "w" not in talk.numbers() and talk.page.inner_text("#tooltip .verdict") == "no gradient"
    talk.page.fill("#search", "onerror")  # what the model read is searched too
    assert talk.listed() == [0, 1]


def test_an_episode_whose_environment_failed_says_so(talk: RunVisit):
    talk.page.click('.row[data-rollout="2"]')
    text = talk.page.inner_text("#view")
    assert "no start" in text and "0 turns" in text and "the environment failed" in text
    assert talk.page.locator("#view .bubble").count() == 1 and "old" not in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_a_conversation_needs_no_sideways_scrolling(talk: RunVisit, width: int, scheme: str):
    """With a call and a result of hundreds of letters without a space."""
    page = talk.page
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.click('.row[data-rollout="1"]')
    inside = "e => e.scrollWidth <= e.clientWidth"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#view").evaluate(inside) and page.locator("#view .bubble").count() == 9
    assert all(b.evaluate(inside) for b in page.locator("#view .bubble").all())
    assert page.locator("#rollouts img, #rollouts script").count() == 0
    read, ground = (
        page.locator("#view .bubble.tool .quoted").evaluate(f"e => getComputedStyle({e}).{name}")
        for e, name in (("e", "color"), ("e.parentElement", "backgroundColor"))
    )
    assert (read, ground) == {
        "light": ("rgb(26, 31, 38)", "rgb(246, 247, 249)"), "dark": ("rgb(230, 233, 237)", "rgb(15, 19, 24)")
    }[scheme]  # fmt: skip


def test_a_conversation_is_printed_whole(talk: RunVisit):
    talk.page.click('.row[data-rollout="1"]')
    talk.on_paper()
    view = talk.page.locator("#view")
    assert view.evaluate("e => e.scrollHeight <= e.clientHeight && e.scrollWidth <= e.clientWidth")
    assert talk.page.evaluate("document.documentElement.scrollWidth") <= 703
    assert talk.page.locator("#view .bubble").last.is_visible()


FILTERED = [
    ({"search": "CUT"}, [3]),
    ({"search": "another prompt"}, [5]),
    ({"search": "nowhere"}, []),
    ({"reward-low": "0.5"}, [0, 2, 5]),
    ({"reward-low": "0.5", "reward-high": "1"}, [0, 2]),
    ({"reward-high": "0"}, [1, 3]),
    ({"step-low": "2"}, [3, 4, 5]),
    ({"step-low": "2", "step-high": "2"}, [3, 4]),
    ({"finish_reason": "length"}, [3]),
    ({"kind": "trained"}, [0, 1, 5]),
    ({"kind": "out_of_region"}, [0, 1]),
    ({"kind": "masked"}, [0]),
    ({"step-high": "1", "kind": "trained", "search": "x"}, [1]),
]


def test_filters_leave_the_right_completions(found: RunVisit):
    page = found.page
    for filters, expected in FILTERED:
        found.clear()
        found.sort_by_step()
        for name, value in filters.items():
            page.select_option(f"#{name}", value) if name in ("finish_reason", "kind") else page.fill(f"#{name}", value)
        assert found.listed() == expected, filters
        assert page.inner_text("#tally").startswith(f"{len(expected)} of 6 completions")


def test_orders(found: RunVisit):
    assert found.listed() == [1, 0, 5, 2, 3, 4]  # the most extreme weight first, those without one last
    orders = {"reward": [1, 3, 2, 0, 5, 4], "length": [5, 1, 0, 4, 3, 2], "step": [0, 1, 2, 3, 4, 5]}
    for name, rising in orders.items():
        found.page.select_option("#sort", name)
        falling = found.listed()
        found.page.uncheck("#falling")
        assert found.listed() == rising, name
        found.page.check("#falling")
        assert falling[0] == (2 if name == "length" else 5), name
        assert falling[-1] == (4 if name == "reward" else falling[-1])


def test_keys(found: RunVisit):
    page = found.page
    found.sort_by_step()
    page.locator("body").click(position={"x": 2, "y": 2})
    for key, expected in (("j", 1), ("j", 2), ("k", 1), ("ArrowDown", 1)):  # arrows belong to the page out there
        page.keyboard.press(key)
        assert found.chosen() == expected, key
    page.locator("#list").focus()
    for key, expected in (("ArrowDown", 2), ("ArrowUp", 1), ("End", 5), ("j", 5), ("Home", 0), ("k", 0)):
        page.keyboard.press(key)
        assert found.chosen() == expected, key
    page.keyboard.press("ArrowRight")
    assert found.numbers()["r"] == "1.25"
    page.keyboard.press("ArrowRight")
    assert found.numbers()["r"] == "5.00"
    page.keyboard.press("ArrowLeft")
    assert found.numbers()["r"] == "1.25"
    page.keyboard.press("/")
    page.keyboard.type("jk/?")
    assert page.input_value("#search") == "jk/?" and found.listed() == []
    page.keyboard.press("Escape")


def luminance(rgb: list[float]) -> float:
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(page: Any, ink: str, ground: str) -> float:
    """Contrast of two of the page's colours, as WCAG 2 defines it."""
    script = """name => {
      const canvas = document.createElement("canvas").getContext("2d");
      canvas.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
      canvas.fillRect(0, 0, 1, 1);
      return Array.from(canvas.getImageData(0, 0, 1, 1).data.slice(0, 3));
    }"""
    high, low = sorted((luminance(page.evaluate(script, name)) for name in (ink, ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(found: RunVisit, scheme: str):
    page = found.page
    page.emulate_media(color_scheme=scheme)
    for ink, least in (("ink", 7.0), ("muted", 4.5), ("accent-ink", 4.5), ("up", 3.0), ("hatch", 3.0)):
        assert contrast(page, ink, "surface") >= least, ink
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(246, 247, 249)") == (scheme == "light")
    swatches = page.locator("#legend .swatch").all()[:9]
    looks = [
        s.evaluate("e => getComputedStyle(e).backgroundColor + getComputedStyle(e).backgroundImage") for s in swatches
    ]
    assert len(set(looks)) == 9


def test_the_scheme_can_change_while_it_is_open(found: RunVisit):
    found.draw_all()
    fills = []
    for scheme in ("light", "dark", "light"):
        found.page.emulate_media(color_scheme=scheme)
        fills.append(found.page.locator(".chart .xtick text").first.evaluate("e => getComputedStyle(e).fill"))
    assert fills[0] == fills[2] != fills[1]


def test_a_narrow_window_needs_no_sideways_scrolling(found: RunVisit):
    for width in (1280, 700, 380):
        found.page.set_viewport_size({"width": width, "height": 800})
        assert found.page.evaluate("document.documentElement.scrollWidth") <= width
        found.token(0).hover()
        box = found.page.locator("#tooltip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


@pytest.mark.parametrize("tokens", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_five_thousand_rollouts(visit: Opener, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: int):
    """Every completion trained on, so that every token has all its numbers."""
    run = write_large_run(tmp_path, 5000, tokens)
    start = time.perf_counter()
    path = write_report(tmp_path, run)
    written, size = time.perf_counter() - start, path.stat().st_size / 1e6
    found = visit(path)
    ready = found.page.evaluate("performance.getEntriesByName('ready')[0].startTime") / 1000
    seconds = found.page.evaluate(
        """async () => {
          const box = document.getElementById("search");
          box.value = "step 7?";
          const start = performance.now();
          box.dispatchEvent(new Event("input", { bubbles: true }));
          await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
          return (performance.now() - start) / 1000;
        }"""
    )
    with capsys.disabled():
        print(
            f"\n5,000 x {tokens} tokens: {size:.1f} MB, written in {written:.1f} s; opened in {ready:.2f} s, ", end=""
        )
        print(f"first filtered by text in {seconds:.2f} s")
    assert found.page.inner_text("#tally").startswith("200 of 5,000")
    assert found.page.locator(".row").count() == 60
    assert size < LIMIT_MB
    assert ready + seconds < LIMIT_S * SLOW_MACHINE
