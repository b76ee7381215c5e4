"""The confirmation on SmolLM2: what it would train, and that finished runs are kept and decided on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import confirmation
from drpo.cli.commands.train import TrainOptions
from drpo.cli.overrides import overridden
from drpo.errors import InputError
from drpo.lab.claims import decide
from drpo.recipes import find
from drpo.train.config import flat_json
from drpo.train.records import CHECKPOINTS, ENVIRONMENT, METRICS, SUMMARY
from study_runs import Record, StudyRun, line_of, plans, read


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


def test_a_comparison_without_all_its_seeds_waits():
    (plan,), told = plans(confirmation.CLAIMS).values(), []
    for missing in (1, 0):
        runs = [cell for cell in confirmation.planned() if cell.seed < len(confirmation.SEEDS) - missing]
        records = {
            c: {"start": 0.0, "end": 0.5 if c.objective == "none" else 0.01 * c.seed, "reward": []} for c in runs
        }
        first = decide(plan, confirmation.comparison(records))[0]
        told.append(line_of("x", plan, first).split(" | ")[-2:])
    assert told == [["waits for 8 seeds of both", "undecided"], ["+46.5 points (+44.5 to +48.5), 8 seeds", "above"]]


def test_verdicts_that_nobody_reads_on_end_without_a_traceback():
    """As `| head` does, once it has its lines."""
    script = "import sys, command; sys.exit(command.run(lambda _: print('x' * 2**20) or 0))"
    studies = Path(confirmation.__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=studies, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stdout.read(1) == b"x"
    process.stdout.close()
    assert process.wait(timeout=60) == 141 and process.stderr and process.stderr.read() == b""


def test_a_run_goes_on_from_its_checkpoint_and_a_finished_one_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cell, folder, asked = confirmation.planned()[0], tmp_path / "run", list[list[str]]()
    finished = {
        "finished": True,
        "evaluation_before": {"reward_mean": 0.1},
        "evaluation_after": {"reward_mean": 0.4},
        "training_seconds": 9.6,
    }

    def drpo(arguments: list[str]) -> int:
        asked.append(arguments[3:])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS).write_text('{"step": 1, "reward_mean": 0.25}\n')
        (folder / ENVIRONMENT).write_text('{"processor": "x"}')
        if len(asked) > 2:
            (folder / SUMMARY).write_text(json.dumps(finished))
        return 1  # as of a run that learnt nothing

    monkeypatch.setattr(confirmation, "status_of", drpo)
    for _ in range(2):  # no checkpoint is there: it begins anew
        with pytest.raises(InputError, match="ended with status 1"):
            confirmation.train(cell, folder)
    assert asked == [confirmation.command(cell, folder)] * 2
    (folder / CHECKPOINTS / "step-000001").mkdir(parents=True)
    monkeypatch.setattr(confirmation, "complete", lambda f: list(f.iterdir()) if f.exists() else [])
    kept = confirmation.train(cell, folder)
    assert asked[2] == ["train", "--resume", str(folder), "--no-doctor", "--plain"]
    assert kept == {
        **vars(cell), "start": 0.1, "end": 0.4, "reward": [0.25], "seconds": 10, "processor": "x"
    } and confirmation.train(cell, folder) == kept and len(asked) == 3  # fmt: skip


def test_a_line_that_was_cut_is_named(tmp_path: Path):
    path = tmp_path / "runs.jsonl"
    whole = json.dumps({"regime": "a", "objective": "none", "rate": 1e-5, "seed": 0}) + "\n"
    for text, message in ((whole + whole[:-9], "line 2: no finished run"), (whole[:-1], "line 1: has no line break")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read(path)


def test_ctrl_c_waits_for_what_the_trainer_still_writes(tmp_path: Path):
    """The trainer answers Ctrl-C slowly; the script that started it ends after it."""
    written, ready = tmp_path / "written", tmp_path / "ready"
    trainer = f"""
import pathlib, signal, time
def stop(*_):
    time.sleep(1)
    pathlib.Path({str(written)!r}).touch()
    raise SystemExit(130)
signal.signal(signal.SIGINT, stop)
pathlib.Path({str(ready)!r}).touch()
time.sleep(60)
"""
    script = f"""
import signal, sys, confirmation
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins with it ignored
confirmation.status_of([sys.executable, '-c', {trainer!r}])
"""
    studies = Path(confirmation.__file__).parent  # `python -c` looks for modules where it begins
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=studies, start_new_session=True, stderr=subprocess.DEVNULL
    )
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) and written.exists()


def test_what_may_be_claimed_is_of_what_is_trained():
    (plan,) = plans(confirmation.CLAIMS).values()
    trained = {cell.objective for cell in confirmation.planned()}
    assert {*plan.objectives, *plan.against} == trained and plan.seeds == (len(confirmation.SEEDS),)
    committed = read(confirmation.RECORDS)
    assert set(committed) <= set(confirmation.planned())
    assert all(len(record["reward"]) == confirmation.STEPS for record in committed.values())
