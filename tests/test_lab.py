"""Comparisons: what they vary, that they survive whatever ends a process, and that they claim no more than they may.

The trials' processes are forks here (`forked`), which import nothing; the slow test has those of `drpo compare`.
"""

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from comparison_figures import draw_curves, draw_finals
from drpo.cli import main
from drpo.errors import InputError
from drpo.lab.analysis import Condition, best, conditions, final, has_collapsed
from drpo.lab.compare import begun, compare
from drpo.lab.grid import Grid, parse_regime, parse_variant, runs
from drpo.lab.trial_result import (
    DIVERGED,
    FAILED,
    FINISHED,
    SERIES,
    Comparison,
    Trial,
    load_results,
    prepare,
    read_comparison,
    read_trial,
    save_results,
)
from drpo.lab.worker import train_trial
from drpo.lab.worker_pool import PoolSize, Worker, fitting
from drpo.train.config import flat_json, to_json
from drpo.train.optim import AdamW
from drpo.train.records import EVALUATIONS, METRICS, RESULTS, ROLLOUTS, read_records
from support.forked_worker import ForkingSubprocess
from support.worlds import tiny_run

TESTS = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def importable_worlds(monkeypatch: pytest.MonkeyPatch):
    """The trials' processes find the tests' tasks and objectives."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])]))


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch):
    """The trials' processes are forks of this one, one at a time."""
    monkeypatch.setattr("drpo.lab.worker_pool.subprocess", ForkingSubprocess)


def trained_here(folder: Path, trials: list[Path], *_: object) -> tuple[Comparison, None]:
    """As `compare`, without processes of their own; one thread, as they have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for trial in trials:
            if not read_trial(trial).over:
                train_trial(trial)
    finally:
        torch.set_num_threads(threads)
    save_results(read_comparison(folder), folder / RESULTS)
    return read_comparison(folder), None


def comparing_elsewhere(folder: Path) -> BaseProcess:
    """A process that trains the trials of a folder; a fork, which imports nothing."""
    process = get_context("fork").Process(
        target=compare, args=(folder, begun(folder), PoolSize(1, 1), lambda pool: None, print)
    )
    process.start()
    return process


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not happened() and time.time() < deadline:
        time.sleep(0.05)


def grid(*objectives: str, **changes) -> Grid:
    return Grid(tuple(map(parse_variant, objectives)), **{"seeds": (0,), **changes})


# What is varied.


def test_every_combination_is_a_trial_with_a_name_of_its_own():
    all_of = runs(
        tiny_run(),
        grid("none", "drpo(0.2) @ 1e-3", seeds=(0, 1), learning_rates=(1e-4, 2e-4), regimes={"updates": (1, 2)}),
    )
    assert len(all_of) == len({r.name for r in all_of}) == 2 * 2 * (2 + 1)
    assert {
        r.optimizer.policy.learning_rate for r in all_of if r.objective.loss == parse_variant("drpo(0.2)").objective
    } == {1e-3}
    assert {(r.seed, r.trainer.updates) for r in all_of} == {(s, u) for s in (0, 1) for u in (1, 2)}
    shared = {
        json.dumps(to_json(replace(r, **{f: getattr(tiny_run(), f) for f in ("name", "objective", "seed")})))
        for r in all_of
    }
    assert len(shared) == 3 * 2  # learning rates and updates are all that is left


def test_a_trials_name_is_its_configurations():
    one, other = (runs(tiny_run(steps=steps), grid("none"))[0].name for steps in (4, 5))
    assert one != other and one == runs(tiny_run(steps=4, name="x"), grid("none", "ppo"))[0].name


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda: grid(), "objectives: name at least one"),
        (lambda: grid("none", "none"), "objectives: none is named twice"),
        (lambda: grid("none", seeds=()), "seeds: name at least one"),
        (lambda: grid("none", regimes={"steps": (1,)}), "not steps"),
        (lambda: parse_variant("drpo(0.2) @ fast"), "must follow the @"),
        (lambda: parse_variant("dropo(0.2)"), "did you mean 'drpo'"),
        (lambda: parse_regime("updates", ["many"]), "whole numbers"),
    ],
)
def test_what_cannot_be_varied_is_refused_by_name(made, named: str):
    with pytest.raises(InputError, match=named):
        made()


def test_as_many_jobs_as_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert fitting("tiny", 3, n_trials=2).jobs == 2
    assert fitting("tiny", 3, n_trials=9).jobs == 3
    size = fitting("tiny", None, n_trials=99)
    assert 1 <= size.jobs * size.threads <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert fitting("tiny", 2, n_trials=2) == PoolSize(jobs=2, threads=3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert fitting("tiny", None, n_trials=2) == PoolSize(jobs=1, threads=1000)


# Trials in processes.


FEW_STEPS = {"steps": 4, "checkpoint_every": 2, "eval_every": 2, "eval_problems": 4, "optimizer": AdamW(3e-2)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison trained in one go."""
    folder = tmp_path_factory.mktemp("whole")
    base = tiny_run(**FEW_STEPS)
    trials = runs(base, grid("none", "drpo(0.2)", seeds=(0, 1)))
    trained_here(folder, prepare(folder, trials))
    return folder


def test_trials_of_a_seed_see_the_same_data_and_begin_at_the_same_score(whole: Path):
    trials = read_comparison(whole).trials
    assert {c.status for c in trials} == {FINISHED}
    for seed in (0, 1):
        of_one = [whole / "trials" / c.name for c in trials if c.seed == seed]
        first = [(r["prompt"], r["token_ids"], r["behavior_logp"]) for r in read_records(of_one[0] / ROLLOUTS)]
        n = len([r for r in read_records(of_one[0] / ROLLOUTS) if r["step"] == 1])
        for other in of_one[1:]:
            records = read_records(other / ROLLOUTS)
            assert [r["prompt"] for r in records] == [prompt for prompt, _, _ in first]
            assert [(r["prompt"], r["token_ids"], r["behavior_logp"]) for r in records][:n] == first[:n]
        assert len({read_records(trial / EVALUATIONS)[0]["reward_mean"] for trial in of_one}) == 1
    assert len({tuple(c.rewards) for c in trials}) == 4


def test_killed_and_resumed_gives_the_same_numbers(forked, whole: Path, tmp_path: Path):
    base = tiny_run(**FEW_STEPS)
    trials = prepare(tmp_path, runs(base, grid("none", "drpo(0.2)", seeds=(0,))))
    process = comparing_elsewhere(tmp_path)
    wait_for(lambda: any(len(read_records(c / METRICS)) >= 3 for c in trials))
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    process.kill()
    process.join()
    assert not all(read_trial(c).over for c in trials)
    again, _ = trained_here(tmp_path, trials)
    assert {c.status for c in again.trials} == {FINISHED}
    assert again.trials == tuple(c for c in read_comparison(whole).trials if c.seed == 0)
    assert not any((c / "checkpoints").exists() for c in trials)
    assert main(["train", "--resume", str(trials[0])]) == 2  # or it would begin again, over what is recorded
    assert read_trial(trials[0]) == again.trials[0]


def test_a_comparison_whose_own_process_dies_leaves_no_one_behind(forked, tmp_path: Path):
    trials = prepare(tmp_path, runs(tiny_run(steps=10000), grid("none")))
    process = comparing_elsewhere(tmp_path)
    wait_for(lambda: bool(read_records(trials[0] / METRICS)))
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.join()
    _, alive = psutil.wait_procs([child], timeout=60)
    assert not alive
    assert (trials[0] / "checkpoints").exists()  # it finished its step and saved


@pytest.mark.slow
def test_ctrl_c_saves_every_trial_under_way(tmp_path: Path):
    trials = prepare(tmp_path, runs(tiny_run(steps=10000), grid("none", "ppo")))
    process = subprocess.Popen(
        [sys.executable, "-m", "drpo", "compare", "--resume", str(tmp_path), "--trust-remote-code", "--jobs", "2"],
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: all(read_records(c / METRICS) for c in trials))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130
    assert f"drpo compare --resume {tmp_path}" in " ".join(said.split())
    assert all((c / "checkpoints").exists() and read_trial(c).status == "stopped" for c in trials)


def test_what_breaks_is_a_result_and_what_fails_does_not_end_the_others(forked, tmp_path: Path):
    base = tiny_run(steps=3, updates=1, sync_every=3, optimizer=AdamW(1e-2), max_skipped=0)
    trained_here(tmp_path, prepare(tmp_path, runs(base, grid("support.worlds:BREAKS_LATER", "support.worlds:Broken"))))
    compare(
        tmp_path,
        prepare(tmp_path, runs(base, grid("support.worlds:EXITS", "none"))),
        PoolSize(1, 1),
        lambda pool: None,
        print,
    )
    found = {c.objective: c for c in read_comparison(tmp_path).trials}
    breaks = found["support.worlds:BREAKS_LATER"]
    assert (breaks.status, breaks.rewards[-1], len(breaks.rewards)) == (DIVERGED, 0.0, 3)
    assert "in step 2" in str(breaks.reason) and final(breaks) == 0.0
    assert has_collapsed(breaks)
    assert found["support.worlds:Broken"].status == FAILED  # in the first step: that is no result of training
    assert (found["support.worlds:EXITS"].status, found["none"].status) == (FAILED, FINISHED)
    assert "status 3" in str(found["support.worlds:EXITS"].reason)


def test_a_comparison_is_written_and_read_back(whole: Path, tmp_path: Path):
    comparison = read_comparison(whole)
    save_results(comparison, tmp_path / RESULTS)
    again = read_comparison(tmp_path)
    assert [c.name for c in again.trials] == [c.name for c in comparison.trials]
    assert [dict(c.config) for c in again.trials] == [dict(c.config) for c in comparison.trials]
    for one, other in zip(comparison.trials, again.trials, strict=True):
        assert one.rewards == pytest.approx(other.rewards, rel=1e-5) and one.evaluations == other.evaluations
    assert load_results(tmp_path / RESULTS) == again
    assert TESTS not in (tmp_path / RESULTS).read_text()


@pytest.mark.parametrize("command", [["report"], ["watch"], ["compare", "--resume"], ["compare", "smoke", "--out"]])
def test_a_comparison_under_its_old_names_is_refused_in_one_line(command: list[str], tmp_path: Path, capsys):
    (tmp_path / "cells").mkdir()
    assert main([*command, str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "e0b217a of the repository reads it" in said
    (tmp_path / RESULTS).write_text('{"cells": []}')
    with pytest.raises(InputError, match="reads it"):
        load_results(tmp_path / RESULTS)


def test_results_without_trials_are_refused(tmp_path: Path):
    (tmp_path / RESULTS).write_text('{"name": "a", "config": {}, "hardware": {}, "trials": []}')
    with pytest.raises(InputError, match="it holds no trials"):
        load_results(tmp_path / RESULTS)


def test_more_trials_join_those_that_are_there(tmp_path: Path):
    first = prepare(tmp_path, runs(tiny_run(), grid("none", seeds=(1, 0))))
    both = prepare(tmp_path, runs(tiny_run(), grid("ppo", "none", seeds=(0,))))
    names = [c.name for c in read_comparison(tmp_path).trials]
    assert names == [*(c.name for c in first), both[0].name] and both[1] == first[1]


# What is said of it.


def a_trial(objective: str, seed: int, end: float, rate: float = 1e-3, updates: int = 1, **changes) -> Trial:
    config = flat_json(
        tiny_run(
            objective=parse_variant(objective).objective, seed=seed, optimizer=AdamW(rate), updates=updates, steps=8
        )
    )
    series = {name: (0.1,) * 8 for name in SERIES} | {"reward_mean": tuple(end * i / 7 for i in range(8))}
    made = Trial(f"{objective}{seed}-{rate}", config, FINISHED, None, series, ((0, 0.1), (8, end)))
    return replace(made, **changes)


def a_comparison(ends: dict[tuple[str, float], list[float]]) -> Comparison:
    trials = [a_trial(o, seed, end, rate) for (o, rate), of in ends.items() for seed, end in enumerate(of)]
    return Comparison("x", tuple(trials), {})


def test_each_objective_is_taken_at_its_best_learning_rate():
    found = conditions(
        a_comparison({("none", 1e-3): [0.2, 0.3], ("none", 1e-2): [0.5, 0.6], ("ppo", 1e-3): [0.4, 0.4]})
    )
    assert len(found) == 3
    assert [(c.objective, c.learning_rate) for c in best(found)] == [("none", 1e-2), ("ppo", 1e-3)]


def test_one_seed_has_no_interval():
    found = conditions(a_comparison({("none", 1e-3): [0.8], ("ppo", 1e-3): [0.2]}))
    assert math.isnan(found[0].mean.low)


def test_without_evaluations_the_last_quarter_of_training_counts():
    trial = a_trial("none", 0, 0.7, evaluations=())
    assert final(trial) == pytest.approx(0.7 * (6 + 7) / 2 / 7)


def test_a_run_that_ends_no_higher_than_it_began_has_collapsed():
    curve = (0.1, 0.5, 0.8, 0.8, 0.4, 0.1, 0.0, 0.0)
    series = {**a_trial("none", 0, 0.7).series, "reward_mean": curve}
    fallen = a_trial("none", 0, 0.7, series=series, evaluations=())
    comparison = Comparison("x", (fallen, a_trial("none", 1, 0.7)), {})
    assert [has_collapsed(t) for t in comparison.trials] == [True, False]
    (condition,) = conditions(comparison)
    assert isinstance(condition, Condition) and condition.collapse.value == 0.5


def test_figures_are_drawn_of_whatever_has_a_result(whole: Path, tmp_path: Path):
    comparison = read_comparison(whole)
    draw_curves(comparison, tmp_path / "curves.png")
    draw_finals(comparison, tmp_path / "finals.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("curves", "finals"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare"], "name a recipe first"),
        (["compare", "--resume"], "name the comparison's folder"),
        (["compare", "--resume", "nowhere"], "no comparison there"),
        (["compare", "smoke", "--objectives", "dropo"], "did you mean 'drpo'"),
        (["compare", "smoke", "--objectives", "none @ x"], "must follow the @"),
        (["compare", "smoke", "--seeds", "x"], "--seeds ['x']: must be whole numbers; see drpo compare smoke --help"),
        (["compare", "smoke", "--learning-rate", "1e-3", "x"], "--learning-rate ['1e-3', 'x']: must be numbers"),
        (["compare", "smoke", "--jobs", "0"], "--jobs 0: must be at least 1"),
        (["compare", "smoke", "--updates", "99"], "updates=99"),
        (["compare", "smoke", "--objective", "none"], "unknown option '--objective'"),
        (["compare", "smoke", "--rollout-precision", "fp3"], "rollout_precision='fp3'"),
        (["compare", "smoke", "--objectives"], "name at least one"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("config.json"))


def test_a_full_disk_ends_no_worker_when_its_process_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def gone(_: str) -> None:
        raise BrokenPipeError

    dead = SimpleNamespace(stdin=SimpleNamespace(write=gone), stdout=True, wait=lambda: 1)
    monkeypatch.setattr("drpo.lab.worker_pool.write_trial_result", full)
    monkeypatch.setattr(Worker, "_start", lambda self: dead)
    assert Worker(1, io.StringIO()).train(tmp_path) == FAILED
