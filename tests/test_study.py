"""The documents of the studies say what the committed results say."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import objectives_2026
from drpo.lab.trial_result import DIVERGED, FINISHED

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_figures", ROOT / "studies" / "figures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_of_the_documents_is_what_the_results_say(figures: ModuleType):
    found = 0
    for document in figures.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert figures.filled(text) == text, f"{document.name}: run python studies/figures.py"
        found += text.count("<!-- table ")
    assert found == len(figures.TABLES)


def test_a_table_that_was_written_by_hand_is_noticed(figures: ModuleType):
    text = figures.DOCUMENTS[0].read_text(encoding="utf-8")
    assert figures.filled(text.replace("%", "\u2030")) != text.replace("%", "\u2030")


def test_the_study_has_its_six_objectives_three_seeds_and_two_regimes(figures: ModuleType):
    comparison = figures.read("addition")
    assert all(c.status in (FINISHED, DIVERGED) for c in comparison.trials)
    for _, trials in comparison.by_regime():
        seeds = {o: {c.seed for c in trials if c.objective == o} for o in comparison.objectives}
        assert len(seeds) >= 6 and all(len(s) >= 3 for s in seeds.values())
    assert len(list(comparison.by_regime())) == 2
    for _, trials in comparison.by_regime():  # what differs besides is the objective
        assert len({c.evaluations[0] for c in trials if c.seed == 0}) == 1


def test_every_objective_of_2026_would_train_the_demo():
    names = {name for spec in objectives_2026.OBJECTIVES for name in re.findall(r"[a-z]\w+", spec)}
    assert names >= {"ipo", "icepop", "kpop", "cppo", "vespo", "gmpo", "m2po", "m2po_areal", "topr", "drpo_eff", "k2"}
    run = {"objective": "topr", "before": [0.1, 0.0, 0.2], "after": [0.5, 0.4, 0.6], "reward_mean": [0.1, 0.45]}
    lines = objectives_2026.table([run]).splitlines()
    assert "| `topr` | 10.0% | 50.0% (40% to 60%) | 0.45 |" in lines
    assert sum("not run" in line for line in lines) == len(objectives_2026.OBJECTIVES) - 1


def test_results_say_nothing_of_the_machine_but_its_hardware(figures: ModuleType):
    for path in figures.RESULTS.glob("*.json"):
        text = re.sub(r"\bruns/\w+", "", path.read_text(encoding="utf-8"))  # of commands
        assert not re.search(r"\"[~.]*/|[a-zA-Z_]/\w", text), path.name
