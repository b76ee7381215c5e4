"""The page of a run and the commands that write it, as far as they can be judged without a browser."""

import base64
import errno
import fnmatch
import hashlib
import json
import logging
import re
import tomllib
from html import unescape
from pathlib import Path

import pytest

from drpo import cli
from drpo.cli import train as train_command
from drpo.report import html, run_page
from drpo.report.panels import MOST_POINTS, PANELS
from drpo.train.config import load_run
from support.hand_run import NASTY, RECORDS, record, write_lines, write_run
from support.pages import figures, payload

ROOT = Path(__file__).resolve().parents[1]


def page_of(folder: Path) -> str:
    return run_page.write_report(folder, load_run(folder)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the run that is written by hand."""
    folder = tmp_path_factory.mktemp("by-hand")
    write_run(folder)
    return page_of(folder)


def test_no_text_of_a_record_stands_in_the_page_as_it_is(tmp_path):
    write_run(tmp_path, [record(NASTY, 0.5, prompt=NASTY, answer=NASTY, reward=None, failure=NASTY)])
    write_lines(tmp_path / "timing.jsonl", [{"step": 1, NASTY: 2.0}])
    (tmp_path / "environment.json").write_text(json.dumps({"processor": NASTY, "versions": {"torch": NASTY}}))
    page = page_of(tmp_path)
    assert NASTY not in page and "<img" not in page and "<script>" not in page
    assert json.loads(payload(page, "rollouts"))["questions"] == [[NASTY, NASTY]]
    (bar,) = figures(page)["timeline"]["data"]
    assert "<" not in bar["name"] and unescape(bar["name"]) == NASTY


def test_half_a_surrogate_pair_in_a_name_costs_no_report(tmp_path):
    page = html.write(html.Page("report", "half: \ud800", "", ("", ""), [], [], []), tmp_path / "report.html")
    assert "<title>half: ?</title>" in page.read_text(encoding="utf-8")


def test_the_page_lets_run_its_own_scripts_and_asks_for_nothing(page):
    (policy,) = map(unescape, re.findall(r'Content-Security-Policy" content="([^"]*)"', page))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy and "script-src 'unsafe" not in policy and "http" not in policy
    (script,) = re.findall(r'<script type="module">(.*?)</script>', page, flags=re.S)
    for text in (script.encode(), payload(page, "plotly")):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" in policy
    head = page[: page.index('<script type="application/gzip"')]
    assert re.findall(r'(?:src|href)="(?!#|data:,)([^"]*)"', head) == [] and "url(" not in head


@pytest.mark.parametrize("bad", ["'</script>'", "'<!--'", "'<SCRIPT'"])
def test_a_script_that_would_end_its_element_is_refused(bad):
    with pytest.raises(ValueError, match="must not hold"):
        html.inline(f"x = {bad}")


def test_the_parts_of_the_page_are_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["drpo"]
    scripts = {*html.SCRIPTS, *run_page.SCRIPTS}
    there = {p.name for p in (ROOT / "src/drpo/report/page").iterdir()}
    assert there == {*scripts, "page.html", "rollouts.html", "style.css"}
    assert all(any(fnmatch.fnmatch(f"report/page/{name}", pattern) for pattern in patterns) for name in there)


@pytest.mark.parametrize("missing", [("environment.json", "timing.jsonl"), ("evaluations.jsonl", "rollouts.jsonl")])
def test_a_run_that_lacks_something_has_a_page_still(tmp_path, missing):
    write_run(tmp_path)
    for name in missing:
        (tmp_path / name).unlink()
    page = page_of(tmp_path)
    assert "<h1>by-hand: drpo(0.2), seed 0</h1>" in page
    drawn = set(figures(page))
    assert ("timeline" in drawn) == ("timing.jsonl" not in missing)
    assert ("histogram" in drawn) == ("rollouts.jsonl" not in missing)


def test_figures_and_tables_are_the_runs(page):
    drawn = figures(page)
    reward = drawn["panel-0"]["data"][0]
    assert (reward["x"], reward["y"]) == ([1, 2, 3], [0.25, 0.5, 0.75])
    assert {"scatter-log", "scatter-linear", "histogram", "timeline"} < set(drawn)
    assert set(re.findall(r'class="chart" id="([^"]*)" role="img" aria-label="[^"]{20,}"', page)) == set(drawn)
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "Training reward: mean score 0.25 0.75 0.25 0.75 3 of 3" in text
    assert "25.0% → 75.0%" in text and "an abacus" in text


def test_a_run_of_thousands_of_steps_has_a_page_of_bounded_size(tmp_path):
    run = write_run(tmp_path, RECORDS[:2])
    keys = [key for panel in PANELS[:4] for key in panel.lines]
    steps = range(1, 1601)
    rows = [{"step": s, "sampled_tokens": 9, **{k: (s * 7919 % 1000) / 999 for k in keys}} for s in steps]
    write_lines(tmp_path / "metrics.jsonl", rows)
    write_lines(tmp_path / "timing.jsonl", [{"step": s, "update": 1.0, "rollout": 2.0} for s in steps])
    path = run_page.write_report(tmp_path, run)
    assert path.stat().st_size < 3_000_000
    drawn = figures(path.read_text())
    assert all(len(t["x"]) <= 2 * MOST_POINTS for figure in drawn.values() for t in figure["data"])
    assert max(drawn["panel-0"]["data"][0]["y"]) == 1.0 and min(drawn["panel-0"]["data"][0]["y"]) == 0.0


# The command line


def test_train_ends_with_a_report_and_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "smoke", "--steps", "1", "--no-doctor"]) == 0
    assert "report       runs/smoke/report.html" in capsys.readouterr().out
    assert (tmp_path / "runs/smoke/report.html").stat().st_size > 1_000_000
    assert cli.main(["report", "runs/smoke", "--out", "elsewhere.html"]) == 0
    assert capsys.readouterr().out == "report       elsewhere.html\n"
    assert (tmp_path / "elsewhere.html").read_bytes() == (tmp_path / "runs/smoke/report.html").read_bytes()


def test_a_report_that_cannot_be_written_is_a_warning_and_the_run_is_done(tmp_path, monkeypatch, capsys, caplog):
    def broken(*_):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(train_command, "write_report", broken)
    with caplog.at_level(logging.WARNING, "drpo"):
        assert cli.main(["train", "smoke", "--steps", "1", "--no-doctor", "--out", str(tmp_path / "run")]) == 0
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name == "drpo"]
    assert "of all things" in warning and "drpo report" in warning and "\n" not in warning
    out = capsys.readouterr().out
    assert "report.html" not in out and "everything" in out


def test_open_shows_the_file(tmp_path, monkeypatch):
    write_run(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("drpo.cli.report.write_report", lambda folder, run, out: folder / "report.html")
    assert cli.main(["report", str(tmp_path)]) == 0 and opened == []
    assert cli.main(["report", str(tmp_path), "--open"]) == 0
    assert opened == [(tmp_path / "report.html").as_uri()]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "name a run's folder"),
        (["nowhere"], "no run there"),
        (["RUN", "--ot", "x"], "did you mean '--out'"),
        (["RUN", "--out", "nowhere/x.html"], "nowhere/x.html"),
        (["BROKEN"], "records cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    write_run(Path("RUN"))
    write_run(Path("BROKEN"))
    write_lines(Path("BROKEN/rollouts.jsonl"), [{"step": 1, "problem": "p"}])
    assert cli.main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_full_disk_names_the_file_and_is_no_fault_of_the_input(tmp_path, monkeypatch, capsys):
    write_run(tmp_path)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(html, "replacing", full)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path / 'report.html'}: no space left on the disk" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "drpo report RUN" in said and "--open" in said and "one HTML file" in said
