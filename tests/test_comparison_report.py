"""What the page of a comparison says, and the commands that write it, as far as it can be judged without a browser."""

import io
import json
import logging
import math
import random
import re
from dataclasses import replace
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from drpo import cli
from drpo.cli import compare as compare_command
from drpo.lab.analysis import best, conditions
from drpo.lab.statistics import paired_difference, t_interval
from drpo.lab.trial_result import DIVERGED, FAILED, WAITING, Comparison, save_results
from drpo.report.comparison_data import (
    THRESHOLD,
    cautions,
    counts,
    differences_table,
    ends_table,
    seeds_sentence,
    trials_tables,
)
from drpo.report.comparison_page import write_comparison_report
from drpo.report.comparison_plots import differences_plot, ends_plot, over_seeds, reward_plot, sweep_plot, view_of
from drpo.report.comparison_table import print_comparison
from drpo.report.html import REPORT
from drpo.train.records import TRIALS
from support.hand_comparison import OBJECTIVES, comparison, large, trial
from support.hand_run import NASTY
from support.pages import figures


@cache
def ragged(seed: int) -> Comparison:
    """Some objectives, regimes and rates, and of each condition other seeds: not every one has a partner."""
    draw = random.Random(seed)
    return comparison(
        [
            trial(objective, s, [draw.random() for _ in range(4)], updates=updates, optimizer=f"adamw({rate})")
            for objective in draw.sample(OBJECTIVES, seed)
            for updates in (1, 8)[: 1 + seed % 2]
            for rate in (1e-4, 1e-3)[: 1 + (seed > 1)]
            for s in draw.sample(range(4), draw.randint(1, 3))
        ]
    )


RAGGED = pytest.mark.parametrize("made", [ragged(2), ragged(3), pytest.param(ragged(1), marks=pytest.mark.slow)])


def triple(interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def page_of(made: Comparison, folder: Path) -> tuple[str, dict[str, Any]]:
    page = write_comparison_report(folder, made).read_text(encoding="utf-8")
    return page, figures(page)


def rows_of(page: str) -> list[str]:
    """The text of every row of the page's tables."""
    return [" ".join(unescape(re.sub(r"<[^>]*>", " ", row)).split()) for row in re.findall(r"<tr>.*?</tr>", page, re.S)]


@RAGGED
def test_ends_and_rates_are_those_of_the_analysis(made: Comparison):
    view, found = view_of(made), conditions(made, THRESHOLD)
    assert list(view.found) == found and list(view.chosen) == best(found)
    ends, sweep = ends_plot(view), sweep_plot(view)
    means = [t for t in ends.figure.data if t.marker.symbol == "line-ns"]
    dots = [t for t in ends.figure.data if t.marker.symbol != "line-ns"]
    for c, mean, seeds in zip(view.chosen, means, dots, strict=True):
        assert (mean.name, mean.x[0]) == (c.objective, c.mean.value)
        assert dict(zip(seeds.customdata, seeds.x, strict=True)) == c.final
        ticks = ends.figure.layout[mean.yaxis.replace("y", "yaxis")]
        assert ticks.ticktext[ticks.tickvals.index(mean.y[0])] == c.objective
        if c.mean.n > 1:
            reach = (mean.x[0] - mean.error_x.arrayminus[0], mean.x[0] + mean.error_x.array[0])
            assert reach == pytest.approx((max(0.0, c.mean.low), min(1.0, c.mean.high)))
        else:
            assert math.isnan(mean.error_x.array[0])
    assert [a.text for a in ends.figure.layout.annotations] == [name for name in view.regimes.values() if name]
    drawn = [(t.name, x, y) for t in sweep.figure.data if t.fill is None for x, y in zip(t.x, t.y, strict=True)]
    assert sorted(drawn) == sorted((c.objective, c.learning_rate, c.mean.value) for c in found)


@RAGGED
def test_differences_are_seed_by_seed_from_the_first_objective(made: Comparison):
    view = view_of(made)
    first = {c.regime: c for c in view.chosen if c.objective == made.objectives[0]}
    pairs = [(c, first[c.regime]) for c in view.chosen if c.objective != made.objectives[0]]
    known = [(a, b) for a, b in pairs if a.final.keys() & b.final.keys()]
    for trace, (c, reference) in zip(differences_plot(view).figure.data, known, strict=True):
        interval = paired_difference({"": c.final}, {"": reference.final}).t
        assert (trace.name, trace.x[0]) == (c.objective, interval.value)
        assert math.isnan(interval.low) or trace.x[0] - trace.error_x.arrayminus[0] == pytest.approx(interval.low)


@RAGGED
def test_curves_are_those_of_the_best_condition(made: Comparison):
    view = view_of(made)
    drawn = reward_plot(view).figure.data
    means, bands = ([t for t in drawn if (t.fill is None) == is_mean] for is_mean in (True, False))
    told = {(t.name, t.xaxis): t for t in means}
    assert len(told) == len(means) == len(bands) == len(view.chosen)
    axes = dict(zip(view.regimes, dict.fromkeys(t.xaxis for t in means), strict=True))
    for c, of_one in zip(view.chosen, view.trials, strict=True):
        mean = told[c.objective, axes[c.regime]]
        (ground,) = [t for t in bands if (t.name, t.xaxis) == (mean.name, mean.xaxis)]
        steps = list(zip(*(t.rewards for t in of_one), strict=True))
        assert list(mean.x) == [1, 2, 3, 4] and np.allclose(mean.y, [np.mean(x) for x in steps], rtol=1e-4)
        assert list(ground.x) == [1, 2, 3, 4, 4, 3, 2, 1]
        assert np.allclose(ground.y, [*map(max, steps), *[min(x) for x in steps[::-1]]], rtol=1e-4)


def test_every_table_says_how_to_read_it(tmp_path: Path):
    made = large(seeds=2, updates=1, steps=4)
    page, _ = page_of(made, tmp_path)
    tables = re.findall(r"<table.*?</table>", page, re.S)
    assert len(tables) >= 5 and all(re.search(r'<span class="reading">[^<]{40,}\.</span>', t) for t in tables)
    console = Console(file=io.StringIO(), width=150)
    print_comparison(console, made)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    titles, heads = (
        [m.start() for m in re.finditer(text, said)] for text in ("A row is an objective", "learning rate +seeds")
    )
    assert titles and len(titles) == len(heads) and all(a < b for a, b in zip(titles, heads, strict=True))


@RAGGED
def test_the_tables_are_those_of_the_analysis(made: Comparison):
    chosen = best(conditions(made))
    regime = [c for c in chosen if c.regime == chosen[0].regime]
    sheet = ends_table("", regime, regime)
    head, rows = sheet.head, sheet.rows
    assert [r[3] for r in rows] == sorted((r[3] for r in rows), reverse=True)
    for c in regime:
        (mine,) = [r for r in rows if r[0] == c.objective]
        assert len(mine) == len(head) and mine[3] == f"{c.mean.value:.3f}" and mine[2] == str(c.mean.n)
    for a, row in zip(regime, differences_table("", regime).rows, strict=True):
        for b, cell_text in zip(regime, row[1:], strict=True):
            shared = a.final.keys() & b.final.keys()
            mean = sum(a.final[s] - b.final[s] for s in shared) / len(shared) if a is not b and shared else None
            assert cell_text.startswith("\u2013" if mean is None else f"{mean:+.3f}"[:5]), (cell_text, mean)


@given(st.lists(st.lists(st.none() | st.floats(-5, 5), max_size=4), min_size=1, max_size=4))
def test_bands_know_only_the_seeds_that_are_there(series):
    line = over_seeds("x", series)
    assert len(line.y) == max(map(len, series))
    for t, drawn in enumerate(zip(line.y, line.low, line.high, strict=True)):
        there = [c[t] for c in series if t < len(c) and c[t] is not None]
        wanted = (np.mean(there), min(there), max(there)) if there else (None,) * 3
        assert (drawn == wanted) if None in wanted else np.allclose(drawn, wanted, rtol=1e-4, atol=1e-9)


def test_a_diverged_trials_metrics_end_and_its_reward_is_0(tmp_path):
    made = trial("none", 0, [0.5] * 4)
    series = {k: v[:2] for k, v in made.series.items()}
    broken = replace(trial("none", 1, [0.5] * 4), status=DIVERGED, series=series, reason="nan")
    page, drawn = page_of(comparison([made, broken]), tmp_path)
    assert drawn["reward-plot"]["data"][1]["y"] == [0.5, 0.5, 0.25, 0.25]
    assert drawn["metric-entropy"]["data"][1]["y"] == [0.1, 0.11, 0.12, 0.13]
    assert any(row.startswith("none-1 diverged 2") and "nan" in row for row in rows_of(page))


def test_trials_are_counted_and_a_seed_that_others_have_is_missing():
    trials = [trial(o, s, [0.1] * 4) for o in ("none", "spo(12.5)") for s in range(3)]
    trials[0] = replace(trials[0], status=FAILED, reason="out of memory")
    trials[1] = replace(trials[1], status=WAITING)
    wanted = {"finished": 3, "diverged": 0, "failed": 1, "waiting": 1, "missing": 1}
    assert counts(comparison(trials[:5])) == wanted


def test_without_a_result_there_is_a_page_still(tmp_path):
    page, drawn = page_of(comparison([trial("none", 0, [])]), tmp_path)
    assert (
        drawn == {}
        and "no trial has come to its end yet" in page
        and any(row.startswith("none-0 waiting 0") for row in rows_of(page))
    )


def test_what_cannot_be_reached_is_said_once_for_all_it_is_true_of():
    (caution,) = cautions(OBJECTIVES)
    assert caution.startswith("drpo(12.5): no token can leave the region")


def test_every_field_is_either_shared_or_a_trials_own():
    made = large(seeds=2, updates=2, steps=4)
    own, shared = trials_tables(made, ["a link"] * len(made.trials))
    assert (own.head[:3], own.head[-2:]) == (("trial", "status", "steps"), ("reason", "report"))
    differ = {"objective", "updates", "optimizer", "seed"}
    assert set(own.head[3:-2]) == differ and not differ & {name for name, _ in shared.rows}
    assert {"model", "sampling.samples"} <= {name for name, _ in shared.rows}
    told = dict(zip(own.head, own.rows[7], strict=True))
    assert [told[name] for name in ("objective", "updates", "optimizer", "seed", "report")] == [
        "ppo(0.2, 0.28)", "1", "adamw(2e-05)", "0", "a link"
    ]  # fmt: skip


def test_every_figure_says_what_it_shows_and_names_its_axes(tmp_path):
    page, drawn = page_of(large(seeds=2, updates=2, steps=4), tmp_path)
    described = re.findall(r'class="chart" id="([^"]*)" role="img" aria-label="[^"]{20,}"', page)
    assert len(drawn) == 4 + 8 and set(described) == set(drawn)
    for name, figure in drawn.items():
        layout = figure["layout"]
        assert any(layout[a].get("title", {}).get("text") for a in layout if a.startswith("xaxis")), name
        if name not in ("ends-plot", "differences-plot"):
            lines = [t for t in figure["data"] if t["name"] in OBJECTIVES and "fill" not in t]
            assert layout["yaxis"]["title"]["text"], name
            assert [t["name"] for t in lines if t["showlegend"]] == list(OBJECTIVES), name
            assert len({(t["name"], str(t["line"])) for t in lines}) == len(OBJECTIVES), name


@given(st.integers(2, 30))
def test_what_seeds_can_show_is_what_the_interval_does(n):
    values = [(-1.0) ** i for i in range(n)]
    interval, deviation = t_interval([values]), float(np.std(values, ddof=1))
    assert f"reaches {(interval.high - interval.value) / deviation:.1f} standard" in seeds_sentence(n)


def test_no_text_of_a_comparison_stands_in_the_page_as_it_is(tmp_path):
    trials = [
        replace(made, config={**made.config, "objective": objective}, reason=NASTY, name=NASTY)
        for made in (trial("none", seed, [0.1] * 4, task=NASTY) for seed in (0, 1))
        for objective in ("none", NASTY)
    ]
    page, drawn = page_of(comparison(trials, NASTY), tmp_path)
    assert NASTY not in page and "<img" not in page and "<script>" not in page
    for name in ("reward-plot", "ends-plot", "differences-plot", "metric-k3"):
        texts = json.dumps({**drawn[name], "data": [{**t, "hovertemplate": ""} for t in drawn[name]["data"]]})
        assert "<" not in texts and "&lt;script>" in texts, name
    assert any(NASTY in row for row in rows_of(page))


def test_a_trials_own_page_is_linked_from_wherever_the_report_is(tmp_path):
    made = comparison([trial("none", s, [0.1] * 4) for s in range(3)])
    names = [c.name for c in made.trials]
    for name in names[:2]:
        (tmp_path / "x" / TRIALS / name).mkdir(parents=True)
    (tmp_path / "x" / TRIALS / names[0] / REPORT).touch()
    for out, link in ((None, ""), (tmp_path / "z z" / "y.html", "../x/")):
        (out or tmp_path).parent.mkdir(exist_ok=True)
        page = write_comparison_report(tmp_path / "x", made, out).read_text()
        assert re.findall(r'<a href="([^#"]*)">open', page) == [f"{link}trials/{names[0]}/report.html"]
        assert re.findall(r"<td><code>(.*)</code></td>", page) == [f"drpo report trials/{names[1]}"]


# The command line


def test_drpo_report_tells_a_comparison_from_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("of").mkdir()
    save_results(large(seeds=2, updates=1, steps=4), Path("of/results.json"))
    assert cli.main(["report", "of"]) == 0
    assert capsys.readouterr().out == f"report       {Path('of') / REPORT}\n"
    assert "24 of 24" in Path("of", REPORT).read_text()
    Path("of/results.json").write_text("{}")
    assert cli.main(["report", "of"]) == 2
    error = capsys.readouterr().err
    assert "results.json cannot be read" in error and error.count("\n") == 1


@pytest.mark.parametrize("broken", [False, True])
def test_compare_ends_with_a_report_or_one_line_that_says_why_not(tmp_path, monkeypatch, capsys, caplog, broken):
    def fails(*_):
        raise ZeroDivisionError("of all things")

    save_results(large(seeds=1, updates=1, steps=4), tmp_path / "results.json")
    monkeypatch.setattr(compare_command, "run_trials", lambda *_: 0)
    if broken:
        monkeypatch.setattr(compare_command, "write_comparison_report", fails)
    with caplog.at_level(logging.WARNING, "drpo"):
        assert compare_command._compare(tmp_path, [], None, True) == 0
    said = [r.getMessage() for r in caplog.records if r.name == "drpo"]
    out = capsys.readouterr().out
    assert (f"report       {tmp_path / REPORT}" in out) is not broken
    assert len(said) == broken and all("of all things" in s and "drpo report" in s for s in said)
