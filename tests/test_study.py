"""The documents of the studies say what the committed results say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

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


def test_results_say_nothing_of_the_machine_but_its_hardware(figures: ModuleType):
    for path in figures.RESULTS.glob("*.json"):
        assert "/" not in path.read_text(encoding="utf-8")
