"""The confirmation on SmolLM2: what it would train, and that finished runs are kept and decided on."""

import math
from pathlib import Path

import pytest

import confirmation
from drpo.cli.commands.train import TrainOptions
from drpo.cli.overrides import overridden
from drpo.errors import InputError
from drpo.recipes import find
from drpo.train.config import flat_json
from study_runs import Record, StudyRun, plans, read


def test_each_run_is_a_training_of_the_demo_with_its_settings():
    runs = confirmation.planned()
    assert len(runs) == len(set(runs)) == 128
    for cell in runs[:16]:
        asked, recipe, *rest = confirmation.command(cell, Path("runs/x"))
        config = flat_json(overridden(find(recipe), rest, "drpo", TrainOptions)[0])
        assert asked == "train" and config["seed"] == cell.seed and config["steps"] == confirmation.STEPS
        assert config["objective"] == cell.objective and config["optimizer"] == f"adamw({cell.rate!r})"
        assert config["updates"] == 8 and config["rollout_precision"] == "fp8_weights"
        assert ("chain_sum" in config["task"]) == cell.regime.startswith("chain_sum")


def test_finished_runs_are_kept_and_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained: list[StudyRun] = []

    def stand_in(cell: StudyRun, folder: Path) -> Record:
        if len(trained) == 100:
            trained.append(cell)
            raise InputError("stopped")
        trained.append(cell)
        folder.mkdir(parents=True)
        end = (0.2 + 0.01 * cell.seed) * (cell.objective == "none") + 0.001 * (cell.seed % 3)
        return {**vars(cell), "start": 0.05, "end": end, "reward": [0.1, end], "seconds": 1, "processor": "x"}

    monkeypatch.setattr(confirmation, "RECORDS", tmp_path / "confirmation.jsonl")
    monkeypatch.setattr(confirmation, "train", stand_in)
    assert not confirmation.run_study(tmp_path, until=0.0) and not trained
    with pytest.raises(InputError, match="stopped"):
        confirmation.run_study(tmp_path, until=math.inf)
    assert list(read(confirmation.RECORDS)) == confirmation.planned()[:100]
    assert confirmation.run_study(tmp_path, until=math.inf)
    assert trained[:100] + trained[101:] == confirmation.planned() == list(read(confirmation.RECORDS))
    decided = confirmation.decisions()["confirmation"]
    assert len(decided) == 12 and all(d.differs == (d.contrast.of == "none") for d in decided)


def test_what_may_be_claimed_is_of_what_is_trained():
    (plan,) = plans(confirmation.CLAIMS).values()
    trained = {cell.objective for cell in confirmation.planned()}
    assert {*plan.objectives, *plan.against} == trained and plan.seeds == (len(confirmation.SEEDS),)
    committed = read(confirmation.RECORDS)
    assert set(committed) <= set(confirmation.planned())
    assert all(len(record["reward"]) == confirmation.STEPS for record in committed.values())
