"""The loop as a whole on a tiny model: it learns, repeats, resumes, stops when told to, and fails with one line.

Not covered here: several processes (test_ranks.py), a GPU, and what full disks do to a checkpoint.
"""

import itertools
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo import cli
from drpo.credit.advantages import maxrl
from drpo.errors import InputError
from drpo.model import loading
from drpo.model.policy import Policy
from drpo.objectives import (
    DPPO,
    DRPO,
    ImportanceSampling,
    PPOClip,
    gradient_weight,
    ratio,
    vanishes_at_zero_advantage,
)
from drpo.reductions import Horizon
from drpo.rollout import ScriptedEngine
from drpo.train import checkpoint, stored
from drpo.train.callbacks import NullCallback
from drpo.train.config import configure, from_json, learning_rate, load_run, to_json
from drpo.train.loop import train
from drpo.train.optim import AdamW, Cosine, Linear, Muon
from drpo.train.records import CHECKPOINTS, EVALUATIONS, METRICS, MODEL, ROLLOUTS, TIMING, read_records
from drpo.train.setup import build
from drpo.train.step import update_policy
from drpo.types import Batch, StepStats
from support import worlds
from support.forks import KillItself, fork
from support.rollouts import with_engine
from support.runs import StopsAfter, assert_same_run, tokens_of
from support.worlds import Letters, sampling, tiny_run


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped; checkpoints leave no trace in it."""
    folder = tmp_path_factory.mktemp("four") / "run"
    train(tiny_run(), folder)
    return folder


def test_it_learns(tmp_path: Path):
    run = tiny_run(steps=14, prompts=8, sampling=sampling(samples=8), optimizer=AdamW(2e-2), eval_problems=32)
    summary = train(run, tmp_path, keep_model=False)
    before, after = summary["evaluation_before"], summary["evaluation_after"]
    assert after["low"] > before["high"], (before, after)


def test_a_run_leaves_what_it_promises(tmp_path: Path):
    run = tiny_run(eval_every=2, checkpoint_every=2)
    summary = train(run, tmp_path)
    assert load_run(tmp_path) == run
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (
        summary["finished"]
        and summary["steps"] == run.trainer.steps
        and summary["updates"] == run.trainer.steps * run.trainer.updates
    )
    assert [m["step"] for m in read_records(tmp_path / METRICS)] == [1, 2, 3, 4]
    assert [e["step"] for e in read_records(tmp_path / EVALUATIONS)] == [0, 2, 4]
    rollouts = read_records(tmp_path / ROLLOUTS)
    assert len(rollouts) == run.trainer.steps * run.data.prompts * run.rollout.sampling.samples
    assert all(len(r["token_ids"]) == len(r["behavior_logp"]) for r in rollouts)
    assert summary["sampled_tokens"] == sum(len(r["token_ids"]) for r in rollouts)
    phases = {name for record in read_records(tmp_path / TIMING) for name in record}
    assert {"rollout", "reward", "update", "sync", "evaluation", "checkpoint"} <= phases
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["cores"] and environment["decoding_step"] == "fused"


@pytest.mark.parametrize(("lora_rank", "base"), [(0, "fp32"), (2, "fp32"), (2, "nf4")])
def test_the_exported_model_is_the_trained_policy(tmp_path: Path, lora_rank: int, base: str):
    run = tiny_run(lora_rank=lora_rank, optimizer=AdamW(1e-2), base_precision=base, steps=2, eval_problems=0)
    components = build(run)
    train(run, tmp_path, components=components)
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / MODEL)(ids).logits
        torch.testing.assert_close(loaded, components.policy.model(ids).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(loaded, loading.tiny()[0](ids).logits, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / MODEL).decode(ids[0]) == components.tokenizer.decode(ids[0])


@pytest.mark.parametrize(
    "objective", [DRPO(0.2), DPPO(0.05, divergence="topk_tv"), DRPO(0.2, advantage_weighted=False)]
)
def test_rollouts_say_what_each_update_saw(tmp_path: Path, objective):
    """The metrics of every update follow from the records of its completions."""
    run = tiny_run(objective=objective, steps=2, updates=2, micro_batch_tokens=64, eval_problems=0)
    train(run, tmp_path, keep_model=False)
    records = read_records(tmp_path / ROLLOUTS)
    updates = [(m["step"], i, u) for m in read_records(tmp_path / METRICS) for i, u in enumerate(m["updates"])]
    assert sum(u["trained_tokens"] > 0 for _, _, u in updates) >= 2
    for step, i, seen in updates:
        of_one = [r for r in records if (r["step"], r["update"]) == (step, i) and "logp" in r]
        assert bool(of_one) == (seen["trained_tokens"] > 0)
        if of_one:
            found = tokens_of(of_one)
            assert (len(found.logp), bool(objective.needs)) == (seen["trained_tokens"], found.divergence is not None)
            assert float(ratio(found).max()) == seen["ratio_max"]
            assert float(gradient_weight(objective, found).min()) == seen["weight_min"]
    for problem in {(r["step"], r["problem"]) for r in records}:
        rewards = torch.tensor([r["reward"] for r in records if (r["step"], r["problem"]) == problem])
        given = torch.tensor([r["advantage"] for r in records if (r["step"], r["problem"]) == problem])
        assert torch.equal(given, rewards - rewards.mean())
    silent = vanishes_at_zero_advantage(objective)
    assert all(("logp" in r) == (r["advantage"] != 0 or not silent) for r in records)


def test_same_seed_same_run_other_seed_another(four_steps: Path, tmp_path: Path):
    train(tiny_run(), tmp_path / "same")
    train(tiny_run(seed=1, steps=1), tmp_path / "other", keep_model=False)
    assert_same_run(four_steps, tmp_path / "same")
    ours, theirs = ((f / ROLLOUTS).read_bytes() for f in (four_steps, tmp_path / "other"))
    assert ours[: len(theirs)] != theirs


def test_killed_before_its_first_checkpoint_it_is_one_run_too(tmp_path: Path):
    class Interrupted(NullCallback):
        def phase(self, name: str) -> None:
            if name == "update":
                raise KeyboardInterrupt

    run = tiny_run(steps=2, eval_problems=2)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "killed", Interrupted())
    train(run, tmp_path / "killed")
    train(run, tmp_path / "whole")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("lora_rank", "base"),
    [pytest.param(0, "fp32", marks=pytest.mark.slow), (2, "fp32"), pytest.param(2, "nf4", marks=pytest.mark.slow)],
)
def test_killed_and_resumed_is_one_run_bit_for_bit(one_thread: None, tmp_path: Path, lora_rank: int, base: str):
    """2N steps in one go equal N, kill -9 somewhere in the next step, resume, N more."""
    run = tiny_run(steps=4, checkpoint_every=2, eval_every=2, lora_rank=lora_rank, schedule=Cosine(warmup=1))
    run = configure(run, kl_in_reward=0.1 if lora_rank else 0.0, base_precision=base)
    train(run, tmp_path / "whole")
    folder = tmp_path / "killed"
    assert fork(tmp_path / "out", train, run, folder, KillItself(2, "sync")).end()[0] == -signal.SIGKILL
    assert stored.latest(folder / CHECKPOINTS).name == "step-000002"
    summary = train(run, folder)
    assert summary["finished"]
    assert_same_run(tmp_path / "whole", folder)


def test_a_run_that_dies_in_its_first_step_is_evaluated_once(tmp_path: Path):
    run = tiny_run(max_skipped=0)
    with pytest.raises(FloatingPointError):
        train(configure(run, objective=worlds.Broken()), tmp_path)
    train(run, tmp_path)
    assert [e["step"] for e in read_records(tmp_path / EVALUATIONS)] == [0, run.trainer.steps]


def test_a_line_cut_short_by_a_crash_is_forgotten(four_steps: Path, tmp_path: Path):
    train(tiny_run(steps=2), tmp_path / "part", keep_model=False)
    with (tmp_path / "part" / METRICS).open("a") as out:
        out.write('{"step": 3, "reward_me')
    with (tmp_path / "part" / ROLLOUTS).open("a") as out:
        out.write('{"step": 3, "text": "written after the checkpoint"}\n')
    train(tiny_run(), tmp_path / "part", keep_model=False)
    for name in (METRICS, ROLLOUTS):
        assert (four_steps / name).read_bytes() == (tmp_path / "part" / name).read_bytes()


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path):
    train(tiny_run(steps=2, eval_problems=0), tmp_path)
    folder = tmp_path / CHECKPOINTS
    (folder / ".step-000003.writing").mkdir()
    (folder / ".step-000003.writing" / stored.WEIGHTS).write_bytes(b"half")
    (folder / "step-000004").mkdir()  # without its state.json it is no checkpoint
    assert stored.latest(folder).name == "step-000002"


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights": lambda c: flip(c / stored.WEIGHTS),
    "optimizer": lambda c: flip(c / stored.OPTIMIZER),
    "cut": lambda c: os.truncate(c / stored.WEIGHTS, 100),
    "gone": lambda c: (c / stored.OPTIMIZER).unlink(),
    "state": lambda c: (c / stored.STATE).write_text((c / stored.STATE).read_text().replace(": 3", ": 2", 1)),
    "no json": lambda c: os.truncate(c / stored.STATE, 10),
}


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after three of four steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("three") / "run"
    train(tiny_run(checkpoint_every=1, keep_checkpoints=3), folder, StopsAfter(3))
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(damage: str, three_steps: Path, tmp_path: Path):
    folder, said = tmp_path / CHECKPOINTS, []
    shutil.copytree(three_steps / CHECKPOINTS, folder)
    DAMAGE[damage](folder / "step-000003")
    assert checkpoint.newest_sound(folder, said.append) == folder / "step-000002"
    assert len(said) == 1 and "step-000003" in said[0] and "going on from the one before" in said[0]


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(
    three_steps: Path, four_steps: Path, tmp_path: Path
):
    shutil.copytree(three_steps, tmp_path / "part")
    flip(tmp_path / "part" / CHECKPOINTS / "step-000003" / stored.WEIGHTS)
    watch = StopsAfter(99)
    train(tiny_run(checkpoint_every=1, keep_checkpoints=3), tmp_path / "part", watch)
    assert "step-000003" in watch.said and "going on from the one before" in watch.said
    assert_same_run(four_steps, tmp_path / "part")


def test_where_every_checkpoint_is_damaged_the_run_does_not_start_anew_by_itself(three_steps: Path, tmp_path: Path):
    shutil.copytree(three_steps, tmp_path / "part")
    for step in (tmp_path / "part" / CHECKPOINTS).glob("step-*"):
        flip(step / stored.WEIGHTS)
    with pytest.raises(InputError, match=r"damaged.*no other checkpoint is left; start anew in another folder"):
        train(tiny_run(checkpoint_every=1, keep_checkpoints=3), tmp_path / "part")


@pytest.mark.usefixtures("without_pictures")
def test_a_full_disk_costs_no_checkpoint_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The second checkpoint does not fit: the first stays, nothing half written does, and the run goes on from it."""
    full = [False]

    def save_file(tensors: dict, path: Path, metadata: dict) -> None:
        if full[0] and path.name == stored.OPTIMIZER:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        safetensors.torch.save_file(tensors, path, metadata)
        full[0] |= path.name == stored.OPTIMIZER

    monkeypatch.setattr("drpo.train.tensor_files.save_file", save_file)
    folder = tmp_path / "part"
    options = ["--steps", "2", "--checkpoint-every", "1", "--eval-problems", "2", "--no-doctor", "--out", str(folder)]
    assert cli.main(["train", "smoke", *options]) == 1
    err = capsys.readouterr().err
    assert "optimizer.safetensors: no space left on the disk; make room, then resume" in err
    assert "no space left" in json.loads((folder / "summary.json").read_text())["reason"]
    assert [p.name for p in (folder / CHECKPOINTS).iterdir()] == ["step-000001"]
    monkeypatch.undo()
    assert cli.main(["train", "--resume", str(folder), "--no-doctor"]) == 0
    assert cli.main(["train", "smoke", *options[:-1], str(tmp_path / "whole")]) == 0
    assert_same_run(tmp_path / "whole", folder)


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path: Path):
    components = build(tiny_run())
    for step in range(1, 6):
        checkpoint.save(tmp_path, stored.Progress(step=step), components.policy.trainable(), components.optimizer)
        checkpoint.prune(tmp_path, keep=2, scores={0: 1.0, 1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(four_steps: Path, tmp_path: Path, number: signal.Signals):
    class Interrupt(NullCallback):
        said = ""

        def stepped(self, step, metrics, seconds, groups) -> None:
            if step == 2:
                os.kill(os.getpid(), number)

        def note(self, text: str) -> None:
            self.said = text

    watch = Interrupt()
    before = signal.getsignal(number)
    summary = train(tiny_run(), tmp_path / "part", watch)
    assert summary["stopped_by_signal"] == number and not summary["finished"] and summary["steps"] == 2
    assert number.name in watch.said
    assert signal.getsignal(number) == before
    train(tiny_run(), tmp_path / "part")
    assert_same_run(four_steps, tmp_path / "part")


def test_signals_are_left_alone_outside_the_main_thread(tmp_path: Path):
    results: list[dict] = []
    thread = threading.Thread(target=lambda: results.append(train(tiny_run(steps=1, eval_problems=0), tmp_path)))
    thread.start()
    thread.join()
    assert results[0]["finished"]


@pytest.mark.parametrize(
    ("reward", "said"), [("raising", "RuntimeError: no verdict today"), ("not_a_number", "returned nan")]
)
def test_a_reward_that_always_fails_ends_in_one_line(tmp_path: Path, reward: str, said: str):
    with pytest.raises(InputError, match=said) as caught:
        train(tiny_run(task=Letters(reward), eval_problems=0), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_reward_that_fails_later_loses_nothing(tmp_path: Path):
    calls = SimpleNamespace(n=0)

    def tiring(problem, text):
        calls.n += 1
        if calls.n > 32:
            raise RuntimeError("tired")
        return worlds.digits(problem, text)

    tiring.in_process = True
    with pytest.raises(InputError, match="tired"):
        train(tiny_run(task=Letters(), reward=None, eval_problems=0), tmp_path, components=_with_reward(tiring))
    assert stored.latest(tmp_path / CHECKPOINTS).name == "step-000002"
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2


def _with_reward(reward):
    return replace(build(tiny_run()), reward=reward)


def test_a_reward_that_sometimes_fails_is_counted_and_the_run_goes_on(tmp_path: Path):
    script = ("", "1", "12", "x2")  # fails, abstains, and two that are marked
    run = tiny_run(task=Letters("flaky"), sampling=sampling(samples=4, max_new_tokens=6), eval_problems=0, steps=2)
    tokenizer = loading.tiny()[1]
    engine = ScriptedEngine(tokenizer, lambda r: script[r.key[-1]], logp=-5.0)
    summary = train(run, tmp_path, components=with_engine(build(run), engine))
    per_step = read_records(tmp_path / METRICS)
    assert [m["reward_failed"] for m in per_step] == [4, 4] and [m["reward_abstained"] for m in per_step] == [4, 4]
    assert summary["reward_failed"] == 8
    assert all(m["reward_mean"] == 0.75 for m in per_step)  # "12" scores 1 and "x2" 1/2; the others count nowhere
    failures = [r["failure"] for r in read_records(tmp_path / ROLLOUTS) if r["failure"]]
    assert len(failures) == 8 and all("a multiple of three" in f for f in failures)
    assert engine.loaded == [0, 1]


def test_broken_log_probabilities_end_the_run_by_name_and_lose_nothing(tmp_path: Path):
    run = tiny_run(eval_problems=0)
    engine = ScriptedEngine(loading.tiny()[1], lambda r: str(r.key[-1]), logp=-1.0)
    breaking = with_engine(build(run), engine)

    class Break(NullCallback):
        def stepped(self, step, metrics, seconds, groups) -> None:
            engine.logp = math.nan if step == 2 else engine.logp

    with pytest.raises(InputError, match=r"problem '2-0': behavior_logp\[0\]=nan"):
        train(run, tmp_path, Break(), breaking)
    assert stored.latest(tmp_path / CHECKPOINTS).name == "step-000002"


@pytest.mark.parametrize(("objective", "warned"), [(DRPO(12.5), True), (DRPO(0.2), False), (PPOClip(), False)])
def test_a_radius_out_of_reach_is_said_when_the_run_starts(tmp_path: Path, objective, warned: bool):
    class Listen(NullCallback):
        said = ""

        def note(self, text: str) -> None:
            self.said += text

    watch = Listen()
    train(tiny_run(objective=objective, steps=1, eval_problems=0), tmp_path, watch, keep_model=False)
    assert ("no token can shift by 1 or more" in watch.said) == warned


def test_versions_say_which_weights_sampled(four_steps: Path):
    assert all(r["version"] == r["step"] - 1 for r in read_records(four_steps / ROLLOUTS))


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path):
    run = tiny_run(objective=worlds.Broken())
    components = build(run)
    before = {name: p.detach().clone() for name, p in components.policy.trainable().items()}
    with pytest.raises(FloatingPointError, match="norm is nan"):
        train(run, tmp_path, components=components)
    assert all(torch.equal(before[name], p) for name, p in components.policy.trainable().items())
    assert [m["skipped_updates"] for m in read_records(tmp_path / METRICS)] == [2]  # the third in a row ends it


def test_a_broken_update_is_skipped_counted_and_kept_for_inspection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The third update of eight has no finite gradient; the run ends well, as if that one had not been."""
    calls = itertools.count()

    def breaks(policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, *rest: object) -> StepStats:
        if next(calls) != 2:
            return update_policy(policy, optimizer, batch, *rest)
        hook = next(iter(policy.trainable().values())).register_hook(lambda gradient: gradient * math.nan)
        try:
            return update_policy(policy, optimizer, batch, *rest)
        finally:
            hook.remove()

    monkeypatch.setattr("drpo.train.loop.update_policy", breaks)
    watch = StopsAfter(99)
    run = tiny_run(prompts=8, keep_checkpoints=9, eval_problems=0)
    summary = train(run, tmp_path, watch)
    metrics = read_records(tmp_path / METRICS)
    assert summary["finished"] and [m.get("skipped_updates", 0) for m in metrics] == [0, 1, 0, 0]
    assert "it was skipped (1 in a row, at most 2)" in watch.said
    assert sorted(stored.steps(tmp_path / CHECKPOINTS)) == [2, 4]  # the weights behind it
    assert "NaN" not in (tmp_path / METRICS).read_text() + (tmp_path / ROLLOUTS).read_text()
    assert len(read_records(tmp_path / ROLLOUTS)) == run.trainer.steps * run.data.prompts * run.rollout.sampling.samples


@pytest.mark.parametrize("terms", [{"reference_kl": 0.1}, {"entropy_bonus": 0.01}, {"kl_in_reward": 0.1}])
def test_additive_terms_train_every_completion(tmp_path: Path, terms: dict[str, float]):
    train(tiny_run(steps=1, eval_problems=0, **terms), tmp_path, keep_model=False)
    for metrics in read_records(tmp_path / METRICS):
        assert metrics["trained_tokens"] == metrics["sampled_tokens"]
        assert ("reward_parts/reference_kl" in metrics) == ("kl_in_reward" in terms)
        assert ("reference_kl" in metrics) == ("reference_kl" in terms)


def test_the_reference_stays_what_the_model_was():
    run = tiny_run(reference_kl=0.5, optimizer=AdamW(1e-2))
    components = build(run)
    before = [p.detach().clone() for p in components.auxiliary.reference.model.parameters()]
    for p in components.policy.model.parameters():
        p.data.add_(1.0)
    assert all(
        torch.equal(a, b) for a, b in zip(before, components.auxiliary.reference.model.parameters(), strict=True)
    )


def test_learning_rates():
    run = tiny_run(steps=4, updates=2, schedule=Linear(warmup=1), optimizer=AdamW(1.0))
    rates = [learning_rate(run, step, update) for step in range(4) for update in range(2)]
    assert rates[:2] == [0.5, 1.0] and rates[2] == 1.0 and rates[-1] == pytest.approx(1 / 6)
    assert sorted(rates[2:], reverse=True) == rates[2:]
    cosine = configure(run, schedule=Cosine(warmup=1))
    assert learning_rate(cosine, 2, 1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"updates": 9}, "updates=9"),
        ({"steps": 0}, "steps=0"),
        ({"precision": "bf15"}, "did you mean 'bf16'"),
        ({"precision": "fp16"}, "precision=fp16: .*--precision bf16"),
        ({"kl_in_reward": 0.1, "advantage": maxrl}, r"kl_in_reward=0\.1: .*maxrl"),
        ({"sampling": sampling(top_p=0.9)}, "top_p=0.9"),
        ({"sampling": sampling(top_k=20)}, "top_k=20"),
        ({"sampling": sampling(samples=1)}, "samples=1"),
        ({"sampling": sampling(temperature=0)}, "temperature=0"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(change: dict, named: str):
    with pytest.raises(InputError, match=named) as caught:
        tiny_run(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "objective", [DRPO(0.2), PPOClip(0.2, 0.28, dual=3.0), ImportanceSampling(), worlds.Broken(), worlds.LOSS]
)
def test_a_configuration_is_written_and_read_back(objective):
    run = tiny_run(
        objective=objective, reward=worlds.digits, eval_task=Letters("flaky"), optimizer=Muon(1e-3, betas=(0.8, 0.9))
    )
    assert from_json(json.loads(json.dumps(to_json(run)))) == run


def test_an_unknown_field_is_named():
    with pytest.raises(InputError, match=r"'trainer\.stepz' in the configuration; did you mean 'steps'"):
        from_json({"trainer": {"stepz": 3}})


def test_zero_held_out_problems_skip_evaluation(tmp_path: Path):
    summary = train(tiny_run(eval_problems=0, steps=1), tmp_path, keep_model=False)
    assert summary["evaluation_before"] is None and summary["evaluation_after"] is None


def test_no_more_updates_than_configured_and_each_sees_its_share(tmp_path: Path):
    train(tiny_run(prompts=5, updates=3, steps=1, eval_problems=0), tmp_path, keep_model=False)
    (metrics,) = read_records(tmp_path / METRICS)
    assert len(metrics["updates"]) == 3
    assert sum(u["trained_tokens"] for u in metrics["updates"]) == metrics["trained_tokens"]


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (
            {"objective": "drpo(0.2)"},
            r"objective='drpo\(0.2\)' is text: build what it means with drpo.train.config.read_value",
        ),
        ({"critic": "gae"}, "critic='gae' is text"),
        ({"steps": "3"}, "steps='3' is text"),
        ({"objective": DRPO}, "objective DRPO is a class"),
        ({"objective": 3}, "objective int has no `tokenwise`"),
        ({"task": 3}, "task=3: must be a task with `sample` and .*; this has no `sample`"),
        ({"eval_task": 3}, "eval_task=3: must be a task"),
        ({"reward": 3}, "reward=3: must be a function"),
        ({"advantage": 3}, "advantage=3: must be a function"),
        ({"reduction": 3}, "reduction=3: must be a function"),
        ({"reduction": Horizon}, "reduction=Horizon: is a class; pass an instance"),
        ({"critic": 1}, "critic=1: must be None or GAE"),
        ({"optimizer": 3}, "optimizer=3: must be an optimiser with `learning_rate` and `build`"),
        ({"optimizer": AdamW}, "optimizer=AdamW: is a class"),
        ({"critic_optimizer": 3}, "critic_optimizer=3: must be an optimiser"),
        ({"schedule": 3}, "schedule=3: must be a schedule"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"sampling": 3}, "sampling=3: RolloutConfig does not take it"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_one_line(changes, wrong):
    with pytest.raises(InputError, match=wrong):
        configure(tiny_run(), **changes)


def test_a_folder_may_be_text(tmp_path):
    train(tiny_run(steps=1), str(tmp_path / "run"), keep_model=False)
    assert (tmp_path / "run" / METRICS).exists()
