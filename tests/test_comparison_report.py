"""What the page of a comparison says, and the commands that write it, as far as it can be judged without a browser."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo import cli
from drpo.cli import compare as compare_command
from drpo.lab.analysis import best, conditions
from drpo.lab.outcome import DIVERGED, FAILED, WAITING, Comparison, save_results
from drpo.lab.statistics import paired_difference, t_interval
from drpo.report.bands import over_seeds, spread, student
from drpo.report.comparison_data import comparison_data, seeds_sentence
from drpo.report.comparison_page import write_comparison_report
from drpo.report.html import REPORT
from drpo.report.payload import json_bytes
from drpo.train.records import CELLS
from hand_comparison import OBJECTIVES, cell, comparison, large
from hand_run import NASTY
from test_report_page import payload

REWARDS = st.lists(st.floats(0, 1), min_size=4, max_size=4)
SEED_REWARDS = st.dictionaries(st.integers(0, 4), REWARDS, min_size=1, max_size=3)
"""Of one condition; seeds may be any, so that not every one has a partner."""


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    cells = [
        cell(objective, seed, rewards, updates=updates, optimizer=f"adamw({rate})")
        for objective in draw(st.lists(st.sampled_from(OBJECTIVES), min_size=1, max_size=3, unique=True))
        for updates in draw(st.lists(st.sampled_from([1, 8]), min_size=1, unique=True))
        for rate in draw(st.lists(st.sampled_from([1e-4, 1e-3]), min_size=1, unique=True))
        for seed, rewards in draw(SEED_REWARDS).items()
    ]
    return comparison(cells)


def same(shown, wanted) -> bool:
    """Equal, where None is what JSON has for nan."""
    return all((a is None and math.isnan(b)) or a == b for a, b in zip(shown, wanted, strict=True))


def triple(interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


@settings(max_examples=settings.default.max_examples // 3)
@given(comparisons())
def test_the_pages_numbers_are_those_of_the_analysis(made: Comparison):
    data = json.loads(json_bytes(comparison_data(made)))
    found, regimes = conditions(made), [regime for regime, _ in made.by_regime()]
    chosen = {(c.regime, c.objective): c for c in best(found)}
    assert len(data["conditions"]) == len(found) and len(data["curves"]) == len(chosen)
    for shown, c in zip(data["conditions"], found, strict=True):
        assert (regimes[shown["regime"]], made.objectives[shown["objective"]]) == (c.regime, c.objective)
        assert (shown["rate"], shown["n"], shown["best"]) == (c.learning_rate, c.mean.n, c in chosen.values())
        assert {seed: end for seed, end in shown["final"]} == c.final
        for name in ("mean", "iqm", "area"):
            assert same(shown[name], triple(getattr(c, name))), name
    for shown in data["differences"]:
        regime, reference = regimes[shown["regime"]], made.objectives[shown["reference"]]
        a, b = chosen[regime, made.objectives[shown["objective"]]], chosen[regime, reference]
        wanted = paired_difference({"": a.final}, {"": b.final}).t
        assert same(shown["difference"], triple(wanted)) and shown["n"] == wanted.n
    pairs = [(x, y) for x in chosen for y in chosen if x != y and x[0] == y[0]]
    assert len(data["differences"]) == len(pairs)


@settings(max_examples=settings.default.max_examples // 3)
@given(comparisons())
def test_curves_are_those_of_the_best_condition(made: Comparison):
    data = json.loads(json_bytes(comparison_data(made)))
    for shown, c in zip(data["curves"], best(conditions(made)), strict=True):
        cells = [
            x
            for x in dict(made.by_regime())[c.regime]
            if (x.objective, x.learning_rate) == (c.objective, c.learning_rate)
        ]
        assert shown["step"] == [1, 2, 3, 4] == list(range(1, shown["of"] + 1))
        for t in range(4):
            wanted = t_interval([[x.rewards[t] for x in cells]])
            drawn = [shown["reward"][name][t] for name in ("mean", "low", "high")]
            for a, b in zip(drawn, triple(wanted), strict=True):
                assert (a is None and math.isnan(b)) or a == pytest.approx(b, rel=1e-4, abs=1e-6)
        assert np.allclose(shown["reward"]["seeds"], [x.rewards for x in cells], rtol=1e-4)


@given(st.lists(st.lists(st.none() | st.floats(-5, 5), max_size=4), min_size=1, max_size=4))
def test_bands_know_only_the_seeds_that_are_there(curves):
    values = over_seeds(curves, 4)
    bands = student(values), spread(values)
    for t in range(4):
        there = [c[t] for c in curves if t < len(c) and c[t] is not None]
        wanted = t_interval([there])
        low, high = (min(there), max(there)) if there else (math.nan, math.nan)
        assert np.allclose([b[t] for b in vars(bands[0]).values()], triple(wanted), atol=1e-6, equal_nan=True)
        assert np.allclose([b[t] for b in vars(bands[1]).values()], (wanted.value, low, high), equal_nan=True)


def test_a_diverged_cells_metrics_end_and_its_reward_is_0():
    made = cell("none", 0, [0.5] * 4)
    broken = replace(
        cell("none", 1, [0.5] * 4), status=DIVERGED, series={k: v[:2] for k, v in made.series.items()}, reason="nan"
    )
    data = comparison_data(comparison([made, broken]))
    (curve,) = data["curves"]
    assert curve["reward"]["mean"] == [0.5, 0.5, 0.25, 0.25] and curve["entropy"]["low"] == [0.1, 0.11, 0.12, 0.13]
    assert data["counts"] == {"finished": 1, "diverged": 1, "failed": 0, "missing": 0}
    assert [c["reason"] for c in data["cells"]] == [None, "nan"]


def test_cells_are_counted_and_a_seed_that_others_have_is_missing():
    cells = [cell(o, s, [0.1] * 4) for o in ("none", "spo(12.5)") for s in range(3)]
    cells[0] = replace(cells[0], status=FAILED, reason="out of memory")
    cells[1] = replace(cells[1], status=WAITING)
    data = comparison_data(comparison(cells[:5]))
    assert data["counts"] == {"finished": 3, "diverged": 0, "failed": 1, "waiting": 1, "missing": 1}


def test_without_a_result_there_is_a_page_still(tmp_path):
    waiting = replace(cell("none", 0, []), status=WAITING)
    data = comparison_data(comparison([waiting]))
    assert data["conditions"] == data["curves"] == data["claims"] == [] and len(data["cells"]) == 1
    assert write_comparison_report(tmp_path, comparison([waiting])).exists()


def test_what_cannot_be_reached_is_said_once_for_all_it_is_true_of():
    cells = [cell(o, 0, [0.1] * 4) for o in OBJECTIVES]
    (caution,) = comparison_data(comparison(cells))["cautions"]
    assert caution.startswith("drpo(12.5): no token can leave the region")


def test_every_field_is_either_shared_or_a_cells_own():
    data = comparison_data(large(seeds=2, updates=2, steps=4))
    assert data["fields"] == ["objective", "updates", "optimizer", "seed"]
    assert {"model", "sampling.samples"} <= {name for name, _ in data["shared"]}
    assert not set(data["fields"]) & {name for name, _ in data["shared"]}
    assert data["cells"][7]["values"] == ["ppo(0.2, 0.28)", "1", "2e-05", "0"]


def test_maps_hold_every_end_at_its_place():
    made = large(seeds=2, updates=3, steps=4)
    maps = {one["objective"]: one for one in comparison_data(made)["maps"]}
    assert sorted(maps) == list(range(6))
    for c in conditions(made):
        one = maps[made.objectives.index(c.objective)]
        y, x = one["updates"].index(c.regime[0]), one["rates"].index(c.learning_rate)
        assert one["end"][y][x] == c.mean.value and one["text"][y][x].startswith(f"{c.mean.value:.2f}")


@given(st.integers(2, 30))
def test_what_seeds_can_show_is_what_the_interval_does(n):
    values = [(-1.0) ** i for i in range(n)]
    interval, deviation = t_interval([values]), float(np.std(values, ddof=1))
    assert f"reaches {(interval.high - interval.value) / deviation:.1f} standard" in seeds_sentence(n)


def test_nothing_of_a_comparison_stands_in_the_page_as_it_is(tmp_path):
    made = replace(cell("none", 0, [0.1] * 4, task=NASTY), reason=NASTY, name=NASTY)
    page = write_comparison_report(tmp_path, comparison([made], NASTY)).read_text()
    assert NASTY not in page and "<img" not in page and "document.title='caught'" not in page
    assert json.loads(payload(page, "comparison"))["cells"][0]["reason"] == NASTY


def test_a_cells_own_page_is_linked_from_wherever_the_report_is(tmp_path):
    made = comparison([cell("none", s, [0.1] * 4) for s in range(3)])
    names = [c.name for c in made.cells]
    for name in names[:2]:
        (tmp_path / "x" / CELLS / name).mkdir(parents=True)
    (tmp_path / "x" / CELLS / names[0] / REPORT).touch()
    for out, link in ((None, ""), (tmp_path / "y.html", "x/"), (tmp_path / "z z" / "y.html", "../x/")):
        (out or tmp_path).parent.mkdir(exist_ok=True)
        page = write_comparison_report(tmp_path / "x", made, out).read_text()
        pages = json.loads(payload(page, "comparison"))["pages"]
        assert pages[names[0]] == {"link": f"{link}cells/{names[0]}/report.html", "command": None}
        assert pages[names[1]] == {"link": None, "command": f"drpo report cells/{names[1]}"}
        assert pages[names[2]] == {"link": None, "command": None}


# The command line


def test_drpo_report_tells_a_comparison_from_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("of").mkdir()
    save_results(large(seeds=2, updates=1, steps=4), Path("of/results.json"))
    assert cli.main(["report", "of"]) == 0
    assert capsys.readouterr().out == f"report       {Path('of') / REPORT}\n"
    assert json.loads(payload(Path("of", REPORT).read_text(), "comparison"))["counts"]["finished"] == 24
    Path("of/results.json").write_text("{}")
    assert cli.main(["report", "of"]) == 2
    error = capsys.readouterr().err
    assert "results.json cannot be read" in error and error.count("\n") == 1


@pytest.mark.parametrize("broken", [False, True])
def test_compare_ends_with_a_report_or_one_line_that_says_why_not(tmp_path, monkeypatch, capsys, caplog, broken):
    def fails(*_):
        raise ZeroDivisionError("of all things")

    save_results(large(seeds=1, updates=1, steps=4), tmp_path / "results.json")
    monkeypatch.setattr(compare_command, "run_cells", lambda *_: 0)
    if broken:
        monkeypatch.setattr(compare_command, "write_comparison_report", fails)
    with caplog.at_level(logging.WARNING, "drpo"):
        assert compare_command._compare(tmp_path, [], None, True) == 0
    said = [r.getMessage() for r in caplog.records if r.name == "drpo"]
    out = capsys.readouterr().out
    assert (f"report       {tmp_path / REPORT}" in out) is not broken
    assert len(said) == broken and all("of all things" in s and "drpo report" in s for s in said)
