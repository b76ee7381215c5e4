"""The page of a run and the commands that write it, as far as they can be judged without a browser."""

import base64
import fnmatch
import hashlib
import json
import logging
import re
import tomllib
from pathlib import Path

import pytest

from drpo import cli
from drpo.cli import train as train_command
from drpo.report import comparison_page, html, run_page
from drpo.train.config import load_run
from hand_run import NASTY, RECORDS, record, write_lines, write_run
from test_report import unpacked

ROOT = Path(__file__).resolve().parents[1]


def page_of(folder: Path) -> str:
    return run_page.write_report(folder, load_run(folder)).read_text(encoding="utf-8")


def payload(page: str, name: str) -> bytes:
    found = re.search(rf'<script type="application/gzip" id="payload-{name}">([^<]*)</script>', page)
    assert found
    return unpacked(found[1])


def test_nothing_of_a_completion_stands_in_the_page_as_it_is(tmp_path):
    write_run(tmp_path, [record(NASTY, 0.5, prompt=NASTY, answer=NASTY, reward=None, failure=NASTY)])
    page = page_of(tmp_path)
    assert "caught" not in page and "onerror" not in page
    assert json.loads(payload(page, "rollouts"))["questions"] == [[NASTY, NASTY]]


def test_the_title_is_escaped():
    page = html.render(html.Page("<b>&", "run.html", (), (), {}))
    assert "<title>&lt;b&gt;&amp;</title>" in page


def test_the_page_lets_run_its_own_scripts_and_asks_for_nothing(tmp_path):
    write_run(tmp_path)
    page = page_of(tmp_path)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy and policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy[1] and "script-src 'unsafe" not in policy[1] and "http" not in policy[1]
    (script,) = re.findall(r'<script type="module">(.*?)</script>', page, flags=re.S)
    for text in (script.encode(), payload(page, "plotly")):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" in policy[1]
    head = page[: page.index('<script type="application/gzip"')]
    assert re.findall(r'(?:src|href)="(?!#|data:,)([^"]*)"', head) == [] and "url(" not in head


@pytest.mark.parametrize("bad", ["'</script>'", "'<!--'", "'<SCRIPT'"])
def test_a_script_that_would_end_its_element_is_refused(bad):
    with pytest.raises(ValueError, match="must not hold"):
        html.inline(f"x = {bad}")


def test_no_name_that_plotly_draws_is_read_as_html():
    for part in ("plots.js", "run_plots.js"):
        assert not re.findall(r"(?:seconds|y|\"lines\"), name,", html.part(part))  # a record's, as it is


def test_the_parts_of_the_page_are_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["drpo"]
    parts = [*html.FRAME_STYLES, *html.FRAME_SCRIPTS, *run_page.STYLES, *run_page.SCRIPTS, "frame.html", "run.html"]
    parts += [*comparison_page.STYLES, *comparison_page.SCRIPTS, "comparison.html"]
    there = {p.name for p in (ROOT / "src/drpo/report/page").iterdir()}
    assert there == set(parts)
    assert all(any(fnmatch.fnmatch(f"report/page/{name}", pattern) for pattern in patterns) for name in parts)


@pytest.mark.parametrize("missing", ["environment.json", "evaluations.jsonl", "timing.jsonl", "rollouts.jsonl"])
def test_a_run_that_lacks_something_has_a_page_still(tmp_path, missing):
    write_run(tmp_path)
    (tmp_path / missing).unlink()
    assert json.loads(payload(page_of(tmp_path), "run"))["name"] == "by-hand"


def test_an_older_run_says_that_it_lacks_what_updates_saw(tmp_path):
    old = [{k: v for k, v in r.items() if k not in ("logp", "update", "advantage")} for r in RECORDS]
    write_run(tmp_path, old)
    run = json.loads(payload(page_of(tmp_path), "run"))
    assert run["recorded"] is False and run["histogram"] is None and run["scatter"]["n"] == 0


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
    assert "report.html" not in out and "curves" in out


def test_open_shows_the_file(tmp_path, monkeypatch):
    write_run(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
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


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "drpo report RUN" in said and "--open" in said and "one HTML file" in said
