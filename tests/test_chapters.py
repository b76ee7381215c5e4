"""Runs go on: one that was lengthened is one long run, what changes is a chapter, and all else is refused in a line.

Not covered here: what a checkpoint holds (test_train.py, test_rollouts.py), a GPU.
"""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drpo import cli
from drpo.errors import InputError
from drpo.live.follow import Follower
from drpo.objectives import DPPO
from drpo.report.run_page import chapter_lines, curves_section
from drpo.report.token_statistics import read_rollouts
from drpo.tasks import Addition
from drpo.train import session, stored
from drpo.train.chapters import CHAPTERS, MAY_CHANGE, Chapter, described, read_chapters
from drpo.train.config import Run, configure, load_run
from drpo.train.continued import chapters_of, differences
from drpo.train.fields import FIELDS
from drpo.train.log import write_json
from drpo.train.loop import train
from drpo.train.optim import Constant, Cosine, Linear
from drpo.train.origin import ORIGIN, START, Origin, read_origin
from drpo.train.records import (
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    METRICS,
    MODEL,
    ROLLOUTS,
    SUMMARY,
    read_json,
    read_records,
)
from drpo.train.rollouts import IN_FLIGHT
from drpo.train.verify import verify
from drpo.train.warm_up import started
from support.forks import KillItself, fork
from support.hand_run import updated
from support.processes import assert_nearly_same_run, launch
from support.rank import run_of
from support.runs import StopsAfter, assert_same_run
from support.worlds import Letters, few_run, sampling

RUN = few_run(
    steps=3,
    prompts=2,
    updates=1,
    sampling=sampling(samples=2),
    eval_every=1,
    eval_problems=2,
    checkpoint_every=1,
    keep_checkpoints=3,
)


def lengthen(folder: Path, run: Run, *steps: int) -> None:
    for n in steps:
        train(configure(run, steps=n), folder)


@pytest.fixture(scope="module")
def lengthened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lengthened") / "run"
    lengthen(folder, RUN, 1, 2, 3)
    return folder


@pytest.fixture
def copy(lengthened: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lengthened, tmp_path / "copy"))


def assert_same_model(a: Path, b: Path) -> None:
    ours, theirs = (load_file(folder / MODEL / "model.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_lengthened_twice_is_one_long_run_bit_for_bit(lengthened: Path, tmp_path: Path):
    train(RUN, tmp_path / "long")
    assert_same_run(tmp_path / "long", lengthened)
    assert_same_model(tmp_path / "long", lengthened)
    assert read_chapters(lengthened) == [Chapter(1, {"steps": (1, 2)}), Chapter(2, {"steps": (2, 3)})]
    assert load_run(lengthened) == RUN and not (tmp_path / "long" / CHAPTERS).exists()
    parts = {part.name: part for part in verify(lengthened)}
    assert all(part.sound for part in parts.values())
    assert parts[CHAPTERS].message.endswith("; from step 3: steps 2 -> 3; as one run of 3 steps")


KINDS: dict[str, dict[str, Any]] = {
    "old weights": {"sync_every": 3},
    "adapters, terms": {"lora_rank": 2, "kl_in_reward": 0.1, "reference_kl": 0.1},
    "warm-up": {"schedule": Constant(warmup=3)},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_runs_are_one_too(one_thread: None, tmp_path: Path, kind: str):
    run = configure(RUN, steps=7, updates=2, checkpoint_every=3, eval_every=2, **KINDS[kind])
    train(run, tmp_path / "long")
    lengthen(tmp_path / "short", run, 2, 4, 7)
    assert_same_run(tmp_path / "long", tmp_path / "short")
    assert_same_model(tmp_path / "long", tmp_path / "short")
    assert [chapter.differs for chapter in read_chapters(tmp_path / "short")] == [(), ()]


@pytest.mark.slow
def test_rollouts_sampled_ahead_differ_from_where_the_chapter_says(one_thread: None, tmp_path: Path):
    run = configure(RUN, steps=5, async_steps=2, schedule=Cosine(), eval_every=0)
    train(run, tmp_path / "long")
    lengthen(tmp_path / "short", run, 3, 5)
    (chapter,) = read_chapters(tmp_path / "short")
    rates, ahead, evaluated = chapter.differs
    assert "learning rates were those of 3" in rates and "steps 4 to 5 ahead" in ahead and "after step 3" in evaluated
    drawn = [{r["step"]: r["version"] for r in read_records(tmp_path / name / ROLLOUTS)} for name in ("long", "short")]
    assert drawn == [{1: 0, 2: 0, 3: 0, 4: 1, 5: 2}, {1: 0, 2: 0, 3: 0, 4: 3, 5: 3}]
    done = [[e["step"] for e in read_records(tmp_path / name / EVALUATIONS)] for name in ("long", "short")]
    assert done == [[0, 5], [0, 3, 5]]


@pytest.mark.parametrize(
    ("settings", "step", "differs"),
    [
        ({}, 20, []),
        ({"schedule": Constant(warmup=30)}, 20, []),
        ({"schedule": Linear()}, 20, ["the learning rates were those of 20"]),
        ({"schedule": Linear(), "prompts": 2, "updates": 2}, 1, ["the learning rates"]),
        ({"schedule": Linear(warmup=30)}, 20, []),
        ({"async_steps": 2}, 20, ["of steps 21 to 22 ahead"]),
        ({"async_steps": 2}, 19, ["of step 21 ahead"]),
        ({"async_steps": 2}, 18, []),
        ({"eval_every": 0}, 20, ["evaluated after step 20"]),
        ({"eval_every": 0}, 19, []),
        ({"eval_every": 0, "eval_problems": 0}, 20, []),
    ],
)
def test_a_chapter_says_what_is_not_as_in_one_run(settings: dict[str, Any], step: int, differs: list[str]):
    run = configure(RUN, **({"steps": 40, "eval_every": 10} | settings))
    said = differences({"steps": (20, 40)}, run, step)
    assert len(said) == len(differs) and all(part in line for part, line in zip(differs, said, strict=True)), said


def test_other_sampling_concerns_evaluations_and_rollouts_in_flight():
    said = differences({"sampling.temperature": (1.0, 0.5)}, configure(RUN, async_steps=1), 2)
    assert len(said) == 2 and "evaluations after step 2" in said[0] and "sampled again" in said[1]
    assert differences({"sampling.samples": (2, 4)}, RUN, 2) == ()


def test_changes_without_a_step_of_their_own_are_one_chapter(copy: Path):
    """At the step of the last chapter, and before it: where a damaged checkpoint sends a run back."""
    first, second = read_chapters(copy)
    assert chapters_of(copy, RUN, 3) == [first, second]
    assert chapters_of(copy, RUN, 2) == [first, second]  # killed in its last chapter
    assert chapters_of(copy, RUN, 1) == [Chapter(1, {"steps": (1, 3)})]
    longer = configure(RUN, steps=9, max_grad_norm=2.0)
    assert chapters_of(copy, longer, 2) == [first, Chapter(2, {"steps": (2, 9), "max_grad_norm": (1.0, 2.0)})]
    assert chapters_of(copy, configure(RUN, steps=2), 2) == [first]
    assert chapters_of(copy / "new", RUN, 0) == []


def test_a_crash_between_chapters_and_configuration_loses_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(path: Path, record: dict[str, Any]) -> None:
        if path.name == CONFIG:
            raise OSError(28, "No space left on device", str(path))
        write_json(path, record)

    monkeypatch.setattr(session, "write_json", fails)
    before = read_chapters(copy)
    with pytest.raises(OSError, match="No space"):
        train(configure(RUN, steps=4), copy)
    assert load_run(copy) == RUN and len(read_chapters(copy)) == 3
    assert all(part.sound for part in verify(copy))
    assert chapters_of(copy, RUN, 3) == before  # resumed without the change
    assert chapters_of(copy, configure(RUN, steps=4), 3) == [*before, Chapter(3, {"steps": (3, 4)})]


@pytest.mark.slow
def test_killed_while_it_is_lengthened_it_goes_on_in_the_same_chapter(one_thread: None, copy: Path, tmp_path: Path):
    run = configure(RUN, steps=7, checkpoint_every=3)
    for after, phase in ((4, "rollout"), (6, "update")):  # before and after the chapter's first checkpoint
        assert fork(tmp_path / f"out-{after}", train, run, copy, KillItself(after, phase)).end()[0] == -signal.SIGKILL
        assert load_run(copy) == run and [c.step for c in read_chapters(copy)] == [1, 2, 3]
        assert not (copy / SUMMARY).exists() and (copy / MODEL).is_dir()
        view = Follower(copy).look()
        assert view.status() == "running" and len(view.chapters) == 3
        assert all(part.sound for part in verify(copy))
        assert cli.main(["eval", str(copy), "--problems", "2"]) == 2  # model/ is that of step 3
    train(load_run(copy), copy)
    train(run, tmp_path / "long")
    assert_same_run(tmp_path / "long", copy)
    assert_same_model(tmp_path / "long", copy)
    assert read_chapters(copy)[-1] == Chapter(3, {"steps": (3, 7), "checkpoint_every": (1, 3)})
    assert read_json(copy / SUMMARY)["finished"]


@pytest.mark.slow
def test_several_processes_lengthen_a_run(tmp_path: Path):
    for folder, processes in (("alone", 1), ("two", 2)):
        for kind in ("fewer", "many"):
            if processes == 1:
                train(run_of(kind), tmp_path / folder)
            else:
                launch(processes, tmp_path / folder, kind, "fsdp")
    assert_nearly_same_run(tmp_path / "alone", tmp_path / "two")
    assert [read_chapters(tmp_path / name)[0].changes["steps"] for name in ("alone", "two")] == [(6, 10)] * 2


@pytest.mark.slow
def test_rollouts_in_flight_are_sampled_again_where_sampling_changes(tmp_path: Path):
    run = configure(RUN, async_steps=1, steps=4)
    train(run, tmp_path, StopsAfter(2))
    last = stored.latest(tmp_path / CHECKPOINTS)
    assert last is not None
    in_flight = read_records(last / IN_FLIGHT)
    assert {r["step"] for r in in_flight} == {2}  # counted from 0
    train(configure(run, **{"sampling.samples": 3}), tmp_path, StopsAfter(3))
    third = [r for r in read_records(tmp_path / ROLLOUTS) if r["step"] == 3]
    assert len(in_flight) == 2 * 2 and len(third) == 2 * 3 and {r["version"] for r in third} == {2}


@pytest.mark.slow
def test_a_schedule_counts_steps_without_a_gradient(tmp_path: Path):
    run = few_run(task=Letters("never"), steps=3, schedule=Linear(), eval_problems=0)
    train(run, tmp_path)
    metrics = read_records(tmp_path / METRICS)
    assert [m["grad_norm"] for m in metrics] == [0, 0, 0]
    rates = [u["learning_rate"] for m in metrics for u in m["updates"]]
    assert rates == pytest.approx([1e-3 * left / 6 for left in (6, 5, 4, 3, 2, 1)])


REFUSED = [
    (["--task", "addition(1, 9)"], "--task: a resumed run keeps it"),
    (["--model", "tiny"], "--model: a resumed run keeps it"),
    (["--seed", "1"], "--seed: a resumed run keeps it"),
    (["--critic", "gae(1.0, 0.95)"], "--critic: a resumed run keeps it"),
    (["--eval-problems", "9"], "--eval-problems: a resumed run keeps it, since training left these problems out alone"),
    (["--eval-task", "addition(1, 9)"], "`drpo eval` scores on others"),
    (["--no-overlap"], "--no-overlap: a resumed run keeps it"),
    (["--template.date", "1 May"], "--template.date: a resumed run keeps it"),
    (["--reward", "exact_number", "--steps", "9"], "drpo train --from"),
    (["--method", "grpo"], "--method NAME"),
    (["--stepz", "4"], "did you mean '--steps'"),
    (["--steps", "2", "--trust-remote-code"], "--steps 2: 3 steps are done"),
    (["--steps", "many"], "must be a whole number"),
    (["--eval-every", "2", "--trust-remote-code"], "all 3 steps are done, so nothing would change; add --steps"),
    (["--objective", "drop(0.2)", "--trust-remote-code"], "did you mean 'drpo'"),
    (["--steps", "4"], "--trust-remote-code"),
]


@pytest.mark.parametrize(("options", "named"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_what_a_resume_cannot_change_is_refused_in_one_line(lengthened: Path, capsys, options: list[str], named: str):
    before = {path: path.stat().st_mtime_ns for path in lengthened.iterdir()}
    assert cli.main(["train", "--resume", str(lengthened), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("drpo: ") and named in line, line
    assert before == {path: path.stat().st_mtime_ns for path in lengthened.iterdir()}


def test_a_run_without_checkpoints_is_not_lengthened(copy: Path, capsys):
    options = ["--steps", "4", "--trust-remote-code"]
    shutil.rmtree(copy / CHECKPOINTS)
    assert cli.main(["train", "--resume", str(copy), *options]) == 2
    assert f"drpo train --from {copy}" in capsys.readouterr().err
    trial = copy.parent / "trials" / "one"
    shutil.copytree(copy, trial)
    assert cli.main(["train", "--resume", str(trial), *options]) == 2
    assert "a comparison's trial keeps its settings" in capsys.readouterr().err


def test_the_help_says_what_may_change(capsys):
    assert set(MAY_CHANGE) <= FIELDS.keys()
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", "--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"--{name.replace('_', '-')}" in out for name in MAY_CHANGE) and "--from RUN" in out


def test_the_report_has_a_line_and_a_sentence_for_each_chapter(lengthened: Path):
    metrics, chapters = read_records(lengthened / METRICS), read_chapters(lengthened)
    section = curves_section(RUN, metrics, [], chapters)
    assert section.plots and "its chapters" in section.text
    assert all([shape.x0 for shape in plot.figure.layout.shapes] == [1.5, 2.5] for plot in section.plots)
    assert chapter_lines(chapters) == [("chapter 2", described(chapters[0])), ("chapter 3", described(chapters[1]))]
    assert not curves_section(RUN, metrics, []).plots[0].figure.layout.shapes


@pytest.mark.slow
def test_the_objective_changes_and_each_step_is_asked_of_its_own(copy: Path, capsys):
    """By the command, with much that may change together."""
    changes = ["--objective", "dppo(0.05, divergence='topk_tv')", "--learning-rate", "0.01", "--schedule", "linear"]
    changes += [
        "--sampling.temperature",
        "0.9",
        "--eval-every",
        "2",
        "--eval-samples",
        "4",
        "--steps",
        "5",
        "--sampling.max-new-tokens",
        "6",
    ]
    trusted = ["--trust-remote-code", "--no-doctor", "--plain"]
    assert cli.main(["train", "--resume", str(copy), *changes, *trusted]) == 0
    assert "from step 4: " in capsys.readouterr().out
    chapter, run = read_chapters(copy)[-1], load_run(copy)
    assert chapter.changes["objective"][0] == "drpo(0.2)" and isinstance(run.objective.loss, DPPO)
    assert chapter.changes["sampling.top_logprobs"] == (0, 20) and chapter.changes["steps"] == (3, 5)
    assert chapter.changes["eval_samples"] == (1, 4)
    evaluations = {e["step"]: e for e in read_records(copy / EVALUATIONS)}
    assert [evaluations[step]["n_samples"] for step in (0, 3, 4, 5)] == [1, 1, 4, 4]
    assert list(evaluations[4]["pass_at"]) == ["1", "2", "4"] and evaluations[4]["difference"] is not None
    asked = {c.record["step"] for c, _ in updated(read_rollouts(copy, run.objective.loss, 10**6))}
    assert min(asked) <= 3 < max(asked) and "from step 4: " in (copy / "report.html").read_text()
    assert cli.main(["verify", str(copy)]) == 0
    rates = [m["learning_rate"] for m in read_records(copy / METRICS)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 0.01 * 2 / 5, 0.01 / 5])


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pictures: None) -> Callable[..., tuple[Path, int]]:
    """Trains a run and begins another with its weights."""
    monkeypatch.chdir(tmp_path)

    def begin(*options: str, source: str = "source", **changes: Any) -> tuple[Path, int]:
        if not Path("source").exists():
            train(configure(RUN, task=Addition(0, 9), name="smoke", steps=2, **changes), Path("source"))
        status = cli.main(["train", "--from", source, "--out", "new", "--no-doctor", "--plain", *options])
        return tmp_path / "new", status

    return begin


@pytest.mark.slow
def test_a_new_run_begins_with_the_weights_of_another(other: Callable[..., tuple[Path, int]], tmp_path: Path, capsys):
    folder, status = other("--steps", "1", "--task", "addition(0, 8)", "--eval-every", "0")
    assert status == 0
    run = load_run(folder)
    assert (run.data.task, run.trainer.steps, run.model.name) == (Addition(0, 8), 1, f"new/{START}")
    assert read_origin(folder) == Origin(str(tmp_path / "source"), 2)
    last = load_file(tmp_path / "source" / MODEL / "model.safetensors")
    begun = load_file(folder / START / "model.safetensors")
    assert begun.keys() == last.keys() and all(torch.equal(begun[name], last[name]) for name in begun)
    assert {part.name: part.message for part in verify(folder)}[START].endswith("source after 2 steps")
    assert other("--model", "tiny")[1] == 2
    assert "leave it out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_checkpoint_is_a_beginning_too(other: Callable[..., tuple[Path, int]], tmp_path: Path, lora_rank: int):
    """Its held-out score is that of the checkpoint, and a resume needs nothing of the other run."""
    step = "step-000001"
    folder, status = other("--steps", "3", source=f"source/checkpoints/{step}", lora_rank=lora_rank)
    assert status == 0 and read_origin(folder) == Origin(str(tmp_path / "source"), 1)
    before, after = (read_records(tmp_path / name / EVALUATIONS) for name in ("source", "new"))
    assert lora_rank or after[0] == before[1] | {"step": 0, **{name: None for name in after[0] if "difference" in name}}
    shutil.rmtree(tmp_path / "source")
    assert cli.main(["train", "--resume", "new", "--steps", "4", "--no-doctor", "--plain"]) == 0
    (tmp_path / "new").rename(tmp_path / "moved")
    assert cli.main(["train", "--resume", "moved", "--steps", "5", "--no-doctor", "--plain"]) == 0
    assert load_run(Path("moved")).model.name == f"new/{START}"  # config.json says where it was


def test_weights_that_a_run_began_with_are_where_the_run_is_now(tmp_path: Path):
    run = configure(RUN, model=f"gone/{START}")
    assert started(run, tmp_path) is run
    (tmp_path / ORIGIN).touch()
    assert started(run, tmp_path).model.name == str(tmp_path / START)


@pytest.mark.slow
def test_of_a_beginning_that_fails_nothing_is_left(
    other: Callable[..., tuple[Path, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def fails(run: Run, ranks: Any) -> None:
        assert Path(run.model.name, "model.safetensors").exists()
        raise InputError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("drpo.cli.train.build", fails)
        folder, status = other()
    assert status == 2 and not folder.exists() and "no room" in capsys.readouterr().err
    folder, status = other(source="source/checkpoints/step-000007")
    assert status == 2 and not folder.exists()
    assert "--from source: source has no weights of that step, only those after step 1, 2\n" in capsys.readouterr().err
    assert cli.main(["train", "smoke", "--from", "source"]) == 2
    assert "comes first" in capsys.readouterr().err
    folder, status = other("--steps", "1")
    (folder / ORIGIN).write_text(json.dumps({"run": 3}))
    with pytest.raises(InputError, match=r"origin\.json cannot be read"):
        read_origin(folder)
