"""The warm-up: what is learnt from, that a killed run is the same run, and what commands say of it.

Not covered: GPUs, servers of rollouts, a model of worth (`studies/warm_start.py`).
"""

import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drpo.cli import main
from drpo.cli.trained import untrained
from drpo.errors import InputError
from drpo.live.follow import Follower
from drpo.live.watch import draw_view
from drpo.model import loading
from drpo.ranks import Ranks
from drpo.terminal import Terminal
from drpo.train.best_of import BestOf, require_spec
from drpo.train.callbacks import NullCallback
from drpo.train.config import configure, load_run, read_value, to_json
from drpo.train.config.sft import load_sft
from drpo.train.loop import train
from drpo.train.optim import AdamW
from drpo.train.own_answers import Selection, as_example
from drpo.train.records import METRICS, SUMMARY, read_json, read_records
from drpo.train.setup import build
from drpo.train.verify import verify
from drpo.train.warm_up import build_started, started
from drpo.train.warmed import ANSWERS, BEFORE, TALLY, WARM_UP, is_warm, read_tally
from support import killer
from support.environments import Chat
from support.forks import fork
from support.hostile import refused, said
from support.runs import assert_same_run, final_tensors
from support.tiny_world import STOPS
from support.worlds import Letters, few_run, sampling

RULE = BestOf(samples=4, right=50.0, answers=2, epochs=2.0, batch=4, learning_rate=1e-3)
RUN = few_run(
    task=Letters("codes"),
    warm_up=RULE,
    stop=tuple(map(str, sorted(STOPS))),
    steps=2,
    prompts=4,
    updates=1,
    sampling=sampling(samples=2),
    checkpoint_every=2,
)
DETERMINISTIC = (ANSWERS, TALLY, BEFORE, METRICS, "config.json", "model/model.safetensors")


def assert_same_warm_up(a: Path, b: Path) -> None:
    for name in DETERMINISTIC:
        assert (a / WARM_UP / name).read_bytes() == (b / WARM_UP / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm") / "whole"
    train(RUN, folder)
    return folder


def record(problem: str, sample: int, reward: float | None, ids: tuple[int, ...], end: str = "stop") -> dict[str, Any]:
    """An answer as its file has it."""
    return {
        **{"step": 1, "problem": problem, "sample": sample, "answer": "", "prompt": "?", "text": "!", "reward": reward},
        **{"finish_reason": end, "prompt_ids": [1, 2], "token_ids": [*ids]},
        "behavior_logp": [-1.0] * len(ids),
    }


def test_right_whole_and_different_answers_are_learnt_from_and_counted(tmp_path: Path) -> None:
    selection, first = Selection(BestOf(right=1.0, answers=2), problems=4), ((0.9, 3), (1.0, 4), (None, 5), (1.0, 4))
    selection.add(
        [
            *(record("a", i, reward, (token,)) for i, (reward, token) in enumerate(first)),
            *(record("b", i, 2.0, (6 + i,)) for i in range(4)),
            *(record("c", 0, 1.0, (10,), "length"), record("c", 1, 0.0, (11,))),
            *(record("d", 0, 1.0, (4,)), record("d", 1, -1.0, (12,))),  # the same question, and an answer known by now
        ]
    )
    assert [r["token_ids"] for r in selection.learnt] == [[4], [6], [7]]
    (tmp_path / "x").write_text("x")
    tally = selection.tally(tmp_path / "x")
    assert (tally.answered, tally.solved, tally.right, tally.cut, tally.learnt) == (4, 4, 8, 1, 3)
    assert tally.reward_mean == pytest.approx((0.9 + 1 + 1 + 8 + 1 + 0 + 1 - 1) / 11) and tally.reward_max == 2
    assert tally.written is not None and tally.written["bytes"] == 1
    line = "a right answer to 4 of 4 problems; 3 answers to learn from; 1 right answer left out, cut at the limit"
    assert str(tally) == f"{line} of tokens (mean reward 1.08)"


def test_what_is_learnt_is_what_was_sampled_token_for_token() -> None:
    turns = record("a", 0, 1.0, (3, 0, 8, 9, 4, 0)) | {"sampled": [[0, 2], [4, 6]], "behavior_logp": [-1.0] * 4}
    turns |= {"branches": [{"prompt_ids": [1], "token_ids": [5, 0], "behavior_logp": [-1.0] * 2}]}
    (episode,) = as_example(turns, 0).episodes
    first, second = episode.sequences
    assert first.token_ids[first.sampled].tolist() == [3, 0, 4, 0] and second.token_ids.tolist() == [5, 0]
    assert first.prompt_ids.tolist() == [1, 2] and episode.n_sampled == 6


def test_every_training_problem_is_answered_and_the_model_learns_its_right_answers(whole: Path) -> None:
    answers, tally = read_records(whole / WARM_UP / ANSWERS), read_tally(whole)
    assert [a["problem"] for a in answers] == [f"letter-{c}" for c in "abcdefghijklmnop" for _ in range(RULE.samples)]
    assert tally is not None and tally.complete and 0 < tally.solved < 16 and tally.learnt > 4
    right = [a for a in answers if a["reward"] >= RULE.right]
    assert tally.right == len(right) and tally.cut == sum(a["finish_reason"] == "length" for a in right)
    losses = read_records(whole / WARM_UP / METRICS)
    assert sum(r["conversations"] for r in losses) == 2 * tally.learnt and losses[-1]["nll"] < losses[0]["nll"]
    assert all(r["conversations"] <= RULE.batch for r in losses)
    assert not (whole / WARM_UP / "checkpoints").exists()


def test_rl_is_that_of_the_warmed_up_model(whole: Path, tmp_path: Path) -> None:
    """As two commands would have it: --model RUN/warm_up/model."""
    model = str(whole / WARM_UP / "model")
    train(configure(RUN, warm_up=None, model=model), tmp_path / "two")
    assert_same_run(whole, tmp_path / "two")
    before, after = (load_file(f / "model" / "model.safetensors") for f in (whole / WARM_UP, whole))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert load_run(whole).model.name == "tiny" and load_run(whole) == RUN and started(RUN, whole).model.name == model


def test_what_rl_alone_never_finds_it_learns_after_the_warm_up(tmp_path: Path) -> None:
    """A right answer is 1 of 257: RL sees none of them in 12 steps, the warm-up a few in 1,024 answers."""
    few = {"steps": 12, "optimizer": AdamW(3e-3), "checkpoint_every": 0}
    run = configure(RUN, **few, task=Letters("begins_q"), sampling=sampling(samples=4, max_new_tokens=4))
    alone = train(configure(run, warm_up=None), tmp_path / "alone")
    assert alone["no_signal_steps"] == 12 and "a warm start (--warm-up best_of, or drpo sft)" in alone["warning"]
    rule = BestOf(samples=64, epochs=10.0, learning_rate=3e-3)
    after = train(configure(run, warm_up=rule), tmp_path / "warm")
    assert after["warm_up"]["learnt"] == 4 and after["no_signal_steps"] == 0
    rewards = [m["reward_mean"] for m in read_records(tmp_path / "warm" / METRICS)]
    assert sum(rewards[6:]) > 1.3 * sum(rewards[:6]) > 0


class StopsIn(NullCallback):
    """Ends a run as Ctrl-C twice does, at the beginning of a phase, for the n-th time."""

    def __init__(self, name: str, n: int) -> None:
        self._name, self._left = name, n

    def phase(self, name: str) -> None:
        self._left -= name == self._name
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lora_rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_anywhere_it_is_one_run_bit_for_bit(lora_rank: int, whole: Path, tmp_path: Path) -> None:
    run, parts = configure(RUN, lora_rank=lora_rank), tmp_path / "parts"
    if lora_rank:
        whole = tmp_path / "whole"
        train(run, whole)
    # In the answers, once more there, in the evaluation, in the fine-tuning, after its checkpoint, before RL, in RL.
    for name, n in (("answers", 2), ("answers", 2), ("evaluation", 1), ("update", 2), ("update", 3), ("sync", 1)):
        with pytest.raises(KeyboardInterrupt):
            train(run, parts, StopsIn(name, n))
        if name == "answers":  # a crash in the midst of writing
            written, all_of_it = (parts / WARM_UP / ANSWERS).read_bytes(), (whole / WARM_UP / ANSWERS).read_bytes()
            assert len(written) > 1000 and all_of_it.startswith(written)
            (parts / WARM_UP / ANSWERS).write_bytes(all_of_it[: len(written) + 900])
        if (name, n) == ("update", 2):
            assert len(read_records(parts / WARM_UP / METRICS)) == 1
    train(run, parts)
    assert_same_warm_up(whole, parts)
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_killed_twenty_times_it_is_one_run(one_thread: None, tmp_path: Path) -> None:
    status, out = fork(tmp_path / "killer", killer.main, tmp_path, 20, 3, configure(RUN, checkpoint_every=1)).end()
    assert status == 0, out[-2000:]
    train(configure(RUN, checkpoint_every=1), tmp_path / "whole")
    for i in range(json.loads(out.splitlines()[-1])["runs"]):
        assert_same_warm_up(tmp_path / "whole", tmp_path / f"run-{i}")
        assert_same_run(tmp_path / "whole", tmp_path / f"run-{i}")


class Signals(NullCallback):
    """Asks for the end, as a scheduler does, in a phase; and keeps what it is told."""

    def __init__(self, name: str) -> None:
        self._name, self.notes = name, []
        self.ends: list[Mapping[str, Any]] = []

    def phase(self, name: str) -> None:
        if name == self._name:
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def ended(self, summary: Mapping[str, Any]) -> None:
        self.ends.append(summary)


@pytest.mark.parametrize(
    "phase", ["answers", *(pytest.param(p, marks=pytest.mark.slow) for p in ("evaluation", "update"))]
)
def test_a_signal_ends_it_with_a_summary_that_a_resume_replaces(phase: str, whole: Path, tmp_path: Path) -> None:
    told = Signals(phase)
    summary = train(RUN, tmp_path / "run", told)
    assert summary["stopped_by_signal"] == signal.SIGTERM and not summary["finished"] and told.ends == [summary]
    assert summary == read_json(tmp_path / "run" / SUMMARY) and not summary["warm_up"]["finished"]
    answered = summary["warm_up"]["answered"]
    assert answered == (4 if phase == "answers" else 16) and (summary["warm_up"]["updates"] > 0) == (phase == "update")
    view = Follower(tmp_path / "run").look()
    assert view.status() == "stopped by signal 15" and view.warm_up is not None
    if phase == "update":
        train(RUN, tmp_path / "run")
        assert_same_run(whole, tmp_path / "run")


def test_where_nothing_is_right_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    never = configure(RUN, task=Letters("never"))
    with pytest.raises(InputError) as error:
        train(never, tmp_path / "never")
    message = str(error.value)
    reason = read_json(tmp_path / "never" / SUMMARY)["reason"]
    assert message.startswith(reason.removesuffix("...")) and Follower(tmp_path / "never").look().reason == reason
    assert message.startswith("warm_up=best_of(4, ") and "of 4 answers to each of 16 problems none is" in message
    assert "the largest reward is 0, " in message and "right=...)" not in message
    assert "drpo sft my.jsonl --model tiny --out runs/warm" in message
    with pytest.raises(InputError, match="of 4 answers to each of 16 problems none is"):
        train(never, tmp_path / "never")  # without sampling again
    assert len(read_records(tmp_path / "never" / WARM_UP / ANSWERS)) == 64
    high = configure(RUN, warm_up=BestOf(samples=4, right=1000.0, problems=4))
    with pytest.raises(InputError, match=r"best_of\(4, right=\.\.\.\) takes less than 1000; or fine-tune"):
        train(high, tmp_path / "high")
    cut = configure(RUN, stop=(), warm_up=BestOf(samples=4, right=0.0001, problems=4))
    with pytest.raises(
        InputError, match=r"the limit of tokens cut \d+ right ones, .*set --sampling.max-new-tokens, or fine"
    ):
        train(cut, tmp_path / "cut")


def test_answers_that_are_not_what_was_written_are_refused(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole / WARM_UP, copy / WARM_UP)
    shutil.rmtree(copy / WARM_UP / "model")
    answers = copy / WARM_UP / ANSWERS
    answers.write_text(answers.read_text().replace('"reward"', '"reward" ', 1))
    with pytest.raises(InputError, match=r"answers.jsonl: changed.*put it back, or start anew in another folder"):
        train(RUN, copy)
    (part,) = [part for part in verify(copy) if part.name == WARM_UP]
    assert not part.sound and "changed" in part.message
    (copy / WARM_UP / TALLY).unlink()
    other = configure(RUN, task=Letters("codes"), seed=1, warm_up=BestOf(samples=4, right=5.0, problems=8))
    with pytest.raises(InputError, match="rollout 1 answers other problems than the task has now"):
        train(other, copy)


@pytest.mark.slow
def test_an_endless_task_in_an_environment_draws_so_many_problems(tmp_path: Path) -> None:
    rule = BestOf(samples=2, right=-1e3, problems=6, epochs=1.0)
    train(configure(RUN, task=Chat(), warm_up=rule, steps=1), tmp_path / "run")
    answers = read_records(tmp_path / "run" / WARM_UP / ANSWERS)
    assert [sum(a["step"] == step for a in answers) for step in (1, 2)] == [8, 4]
    learnt = [a for a in answers if a["finish_reason"] == "stop" and len(a["turns"]) > 1]
    assert learnt and all("sampled" in a or "branches" in a for a in learnt)


def test_the_loop_refuses_parts_of_a_model_that_is_not_warm(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its warm-up is not done; `drpo train --resume"):
        train(RUN, tmp_path / "run", components=build(configure(RUN, warm_up=None)))


def test_several_processes_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"warm_up=best_of\(4.*\): one process does it, and here are 2; begin without"):
        build_started(RUN, tmp_path / "run", NullCallback(), ranks=Ranks(rank=1, size=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["best-of 8", "best_of 8", "Best-of-8", "best-of(8)", "bestof8", "8", "best of 8"])
def test_another_form_is_answered_with_the_spec(text: str) -> None:
    with pytest.raises(InputError, match=r"write it as --warm-up 'best_of\(8\)'"):
        require_spec(text)
    for right in ("best_of(8)", "best_of", "none", "best_of(4, right=0.5)", "my_module:Rule"):
        require_spec(right)


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("best_of(0)", "samples=0: must be a whole number from 1"),
        ("best_of(8, epochs=0)", "epochs=0: must be a number above 0"),
        ("best_of(8, right='yes')", "right='yes': must be a number"),
        ("best_of(8, answrs=2)", "unexpected keyword argument 'answrs'; the arguments are"),
        ("best_off(8)", "unknown warm-up 'best_off'; did you mean 'best_of'"),
        ("random:random", "must be a BestOf; write best_of"),
    ],
)
def test_a_warm_up_that_cannot_be_is_named(spec: str, fault: str) -> None:
    with pytest.raises(InputError) as error:
        read_value("warm_up", spec)
    assert fault in str(error.value)
    assert to_json(configure(RUN, warm_up=BestOf()))["warm_up"] == "best_of(8)"


SMOKE = (
    "train",
    "smoke",
    "--prompts",
    "2",
    "--sampling.samples",
    "2",
    "--eval-problems",
    "2",
    "--no-doctor",
    "--plain",
)
REWARD = "support.worlds:codes"
WARM = ("--warm-up", "best_of(4, right=5.0, problems=4)", "--reward", REWARD, "--stop", *map(str, sorted(STOPS)))


def test_the_command_warms_up_trains_and_says_so(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    shown = said([*SMOKE, "--steps", "1", "--out", out, *WARM])
    assert shown.status == 0, shown.err
    assert "warm-up: a right answer to 4 of 4 problems" in shown.out and "learnt from, loss" in shown.out
    for when in ("before", "after the warm-up", "after RL"):
        assert f"reward {when}" in shown.out
    summary = read_json(tmp_path / "run" / SUMMARY)["warm_up"]
    assert summary["finished"] and summary["nll_last"] < summary["nll_first"] and summary["seconds"] > 0
    assert (
        summary["evaluation_before"]["step"] == 0
        and summary["updates"] == load_sft(tmp_path / "run" / WARM_UP).trainer.steps
    )
    for command in (["verify", out], ["verify", f"{out}/{WARM_UP}"], ["report", f"{out}/{WARM_UP}"]):
        assert said(command).status == 0, command
    assert "warm-up: " in said(["watch", out, "--once"]).out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "after the warm-up: " in page and "before the warm-up: " in page and "a right answer to" in page
    assert "the warm-up of a run; `drpo train --resume" in refused(["sft", "--resume", f"{out}/{WARM_UP}"])


def test_a_command_that_was_stopped_in_its_warm_up_goes_on(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drpo.train.warm_up.append", _signalling(os.kill))
        shown = said([*SMOKE, "--steps", "1", "--out", out, *WARM])
    assert shown.status == 128 + signal.SIGTERM and f"stopped early; go on with: drpo train --resume {out}" in shown.out
    assert "--learning-rate cannot change in its warm-up" in refused(
        ["train", "--resume", out, "--trust-remote-code", "--learning-rate", "1e-5"]
    )
    assert "a run is there" in refused([*SMOKE, "--steps", "2", "--out", out, *WARM])
    assert said(["train", "--resume", out, "--trust-remote-code", "--no-doctor", "--plain"]).status == 0
    assert read_json(tmp_path / "run" / SUMMARY)["finished"] and is_warm(tmp_path / "run")


def _signalling(kill: Any) -> Any:
    def append(path: Path, records: Any) -> None:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        kill(os.getpid(), signal.SIGTERM)

    return append


def test_commands_refuse_a_warm_up_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "write it as --warm-up 'best_of(8)'" in refused([*SMOKE, "--warm-up", "best-of", "8"])
    assert "write it as --warm-up 'best_of(8)'" in refused([*SMOKE, "--warm-up=best-of 8"])
    assert "--warm-up: a comparison would do it again for every trial" in refused(
        ["compare", "smoke", "--warm-up", "best_of(8)"]
    )
    assert "--warm-up: a resumed run keeps it, since it comes before the first step" in refused(
        ["train", "--resume", str(tmp_path), "--warm-up", "best_of(8)"]
    )


@pytest.mark.slow
def test_a_checkpoint_with_adapters_is_exported_over_the_warmed_up_weights(tmp_path: Path) -> None:
    run = configure(RUN, lora_rank=2, steps=2, checkpoint_every=1)
    train(run, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--step", "2", "--trust-remote-code"]) == 0
    exported, trained = (load_file(f / "model.safetensors") for f in (tmp_path / "out", tmp_path / "run" / "model"))
    for name, weight in trained.items():
        torch.testing.assert_close(exported[name], weight, rtol=1e-5, atol=1e-6)
    assert final_tensors(tmp_path / "run")
    adapter = tmp_path / "adapter"
    assert main(["export", str(tmp_path / "run"), str(adapter), "--adapter", "--step", "2", "--trust-remote-code"]) == 0
    base = (tmp_path / "run" / WARM_UP / "model").resolve()
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == str(base)
    again = loading.load(str(adapter))[0].state_dict()
    for name, weight in trained.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-5, atol=1e-6)


def test_untrained_is_the_model_before_the_warm_up_and_adapters_belong_to_the_one_after(whole: Path) -> None:
    first, base = (untrained(whole, True, warm=warm)[0].state_dict() for warm in (False, True))
    before = loading.load(RUN.model.name)[0].state_dict()
    after = loading.load(str(whole / WARM_UP / "model"))[0].state_dict()
    assert all(torch.equal(first[name], weight) for name, weight in before.items())
    assert all(torch.equal(base[name], weight) for name, weight in after.items())
    assert not all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_run_from_a_warm_one_does_not_warm_up_again(whole: Path, tmp_path: Path) -> None:
    flags = ("--trust-remote-code", "--steps", "1", "--no-doctor", "--plain", "--out", str(tmp_path / "run"))
    assert said(["train", "--from", str(whole), *flags]).status == 0
    assert load_run(tmp_path / "run").warm_up is None and not (tmp_path / "run" / WARM_UP).exists()


def test_watch_shows_a_warm_up_under_way(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    for name in (METRICS, SUMMARY, "evaluations.jsonl", "rollouts.jsonl", "timing.jsonl", f"{WARM_UP}/{METRICS}"):
        (copy / name).unlink()
    tally = read_json(copy / WARM_UP / TALLY) | {"answered": 8, "written": None}
    (copy / WARM_UP / TALLY).write_text(json.dumps(tally))
    console = Terminal(record=True, width=200)
    with console.capture() as shown:
        console.print(draw_view(Follower(copy).look(), 200))
    assert "warm-up: 8 of 16 problems answered, " in shown.get()
