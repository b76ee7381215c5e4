"""The stability benchmark: its language and tasks, what it varies, and (slow) that its script trains and draws maps."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

import stability
from command import run
from drpo.errors import InputError
from drpo.lab.trial_result import RESULTS
from drpo.train.config import configure
from stability import StabilityOptions, stability_runs
from stability_maps import draw_maps
from support.hand_comparison import comparison, trial
from tail_language import KINDS, Tail, class_share, speaker, task_of


@pytest.mark.slow  # the first time on a machine it is taught
def test_the_speaker_speaks_the_language():
    model, tokenizer = speaker()
    drawn = model.generate(
        **tokenizer(["q3"] * 256, return_tensors="pt"), do_sample=True, max_new_tokens=8, min_new_tokens=8, top_k=0
    )
    texts = [tokenizer.decode(row[1:]).split() for row in drawn]
    kinds = ["".join(w[0] for w in text) for text in texts]
    assert kinds.count("htht" * 2) > 200
    heeded = sum(int(w[1:]) % 8 == 3 for text in texts for w in text) / (256 * 8)
    assert 0.2 < heeded < 0.5  # an eighth would be chance
    with_probability = model(drawn).logits[:, :-1].softmax(-1).gather(-1, drawn[:, 1:, None])[..., 0]
    assert 0.45 < float((with_probability < 0.01).float().mean()) < 0.55


def test_words_count_at_their_places_alone():
    (problem,) = Tail("noise").sample(1, step=0, seed=0)
    cue = problem.data["cue"]
    right, rare, wrong = f"h{cue + 8}", f"t{cue}", f"h{(cue + 1) % 8}"
    assert class_share(problem, " ".join([right, rare] * 4)) == 1.0
    assert class_share(problem, " ".join([rare, right] * 4)) == 0.0
    assert class_share(problem, " ".join([right] * 2 + [wrong] * 6)) == 0.25
    assert class_share(replace(problem, data={"letter": "t", "cue": cue}), " ".join([wrong, rare] * 4)) == 1.0
    with pytest.raises(InputError, match="eval_problems"):
        Tail("noise").held_out(1)


def test_the_benchmark_varies_what_it_says():
    assert {r.optimizer.policy.learning_rate for r in stability_runs(["none @ 5e-3"], seeds=[0])} == {5e-3}
    trials = stability_runs(["none"], seeds=[0])
    assert {
        (r.data.task, r.trainer.updates, r.optimizer.policy.learning_rate, r.rollout.precision) for r in trials
    } == {
        (Tail(kind), u, lr, p)
        for kind in ("noise", "meaning")
        for u in (4, 16)
        for lr in (1e-3, 2e-3, 4e-3)
        for p in ("fp32", "fp8")
    }


def test_the_help_says_how_many_trainings_there_are(capsys: pytest.CaptureFixture[str]):
    by = StabilityOptions()
    in_all = stability_runs(by.objectives, by.seeds, by.updates, by.learning_rate, by.rollout_precision)
    with pytest.raises(SystemExit):
        run(stability.stability, ["--help"])
    assert f" {len(in_all)} trainings " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--objectives", "nope"], "unknown objective"),
        (["--objectives"], "name at least one"),
        (["--updates", "17"], "updates=17"),
        (["--jobs", "0"], "--jobs 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(stability.stability, [*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_what_is_no_task_is_refused():
    with pytest.raises(InputError, match="must be 'noise' or 'meaning'"):
        Tail("nose")


def test_a_map_is_drawn_of_a_tasks_trials(tmp_path: Path):
    changes = {"task": task_of("noise"), "updates": 4, "rollout_precision": "fp32"}
    trials = [trial(o, seed, [0.2, 0.4], **changes) for o in ("none", "ppo(0.2, 0.28)") for seed in (0, 1)]
    draw_maps(comparison(trials), task_of("noise"), "noise", tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_stopped_before_its_first_result_it_just_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # which the script adds to
    monkeypatch.setattr(stability, "run_trials", lambda *_: 130)
    assert run(stability.stability, ["--objectives", "none", "--seeds", "0", "--out", str(tmp_path)]) == 130


@pytest.mark.slow
def test_it_draws_its_maps_and_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(stability, "stability_runs", lambda *by: [configure(r, steps=2) for r in stability_runs(*by)])
    arguments = ["--objectives", "none", "--seeds", "0", "--updates", "2", "--learning-rate", "1e-3"]
    arguments += ["--rollout-precision", "fp32", "--out", str(tmp_path), "--plain"]
    assert run(stability.stability, arguments) == 0
    made = (*(f"stability_{kind}.png" for kind in KINDS), "stability/report.html")
    assert all((tmp_path / name).exists() for name in made)
    first = (tmp_path / "stability" / RESULTS).read_text()
    assert not list(tmp_path.glob("stability/trials/*/rollouts.jsonl"))
    assert run(stability.stability, arguments) == 0
    assert (tmp_path / "stability" / RESULTS).read_text() == first
