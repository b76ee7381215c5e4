"""A run that trains on nothing says so, and what a run changed is measured problem by problem.

Not covered: how the report's page draws it (test_report_browser.py).
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drpo.credit import credit_rule
from drpo.credit.advantages import mean, reward
from drpo.credit.gae import GAE
from drpo.credit.overlong import Shaped, mask
from drpo.credit.reference_kl import with_reference_kl, without_reference_kl
from drpo.doctor import signal
from drpo.errors import InputError
from drpo.report.run_summary import held_out, run_summary
from drpo.rewards import in_process
from drpo.train.callbacks import NullCallback
from drpo.train.config import Run, configure, from_json, load_run, to_json, trains_little
from drpo.train.evaluate import summed_up
from drpo.train.loop import train
from drpo.train.metrics import rollout_metrics, signal_metrics
from drpo.train.no_gradient import due, explained, in_all, lately, learnt_nothing, trailing, without_signal
from drpo.train.optim import AdamW, Constant
from drpo.train.records import EVALUATIONS, METRICS, read_records
from drpo.train.step import take_step
from drpo.types import Problem, RewardResult, ScoredGroup, Transcript
from support.tiny_world import completion
from support.worlds import Letters, tiny_run


class Notes(NullCallback):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_a_run_of_equal_rewards_says_that_nothing_was_learnt(tmp_path: Path) -> None:
    notes = Notes()
    summary = train(tiny_run(steps=5, task=Letters("never"), eval_problems=2), tmp_path, notes, keep_model=False)
    assert summary["zero_grad_steps"] == 5 and summary["zero_grad_updates"] == summary["updates"] == 10
    assert summary["frac_reward_zero_std"] == 1 and summary["trained_tokens"] == 0 and learnt_nothing(summary)
    lately_said, end = [line for line in notes.said if "trained on nothing" in line or "learnt" in line]
    assert lately_said.startswith("the last 3 steps trained on nothing") and "all wrong in 100% of groups" in end
    assert end == summary["warning"] and end.startswith("nothing was learnt: no update of 5 steps had a gradient")
    assert not learnt_nothing(summary | {"steps": 4, "no_signal_steps": 4})  # which may have lacked luck alone
    assert "--sampling.max-new-tokens" in end and "--sampling.samples" in end
    shown = dict(run_summary(load_run(tmp_path), {}, read_records(tmp_path / METRICS)))
    assert shown["no gradient"].startswith("5 of 5 steps; 10 of 10 updates") and shown["warning"] == end


def test_a_run_that_learns_has_no_warning_and_its_difference_from_step_0(tmp_path: Path) -> None:
    notes = Notes()
    summary = train(tiny_run(steps=2, eval_samples=2), tmp_path, notes)
    assert summary["zero_grad_steps"] == 0 and summary["warning"] is None
    assert notes.said == [] and not learnt_nothing(summary)
    first, last = read_records(tmp_path / EVALUATIONS)
    gains = [last["problem_means"][name] - mean for name, mean in first["problem_means"].items()]
    change = summary["evaluation_difference"]
    assert change["value"] == last["difference"] == pytest.approx(sum(gains) / len(gains)) and len(gains) == 8
    assert change["low"] < change["value"] < change["high"] and first["difference"] is None
    old = [{k: v for k, v in e.items() if "difference" not in k and k != "problem_means"} for e in (first, last)]
    assert not any("from step 0" in text for _, text in held_out(old))
    (tmp_path / EVALUATIONS).write_text("".join(json.dumps(e) + "\n" for e in old[:1]))  # as an earlier version left it
    (tmp_path / "config.json").write_text(json.dumps(to_json(configure(load_run(tmp_path), steps=3))))
    assert train(load_run(tmp_path), tmp_path, accept_records=True)["evaluation_difference"] is None


def test_which_steps_are_spoken_of_and_when() -> None:
    idle, busy, skipped = {"grad_norm": 0.0}, {"grad_norm": 1e-30}, {"skipped_updates": 1}
    assert [len(trailing(steps)) for steps in ([], [idle], [idle, busy], [busy, idle, {}], [idle, skipped])] == [
        0, 1, 0, 2, 0,
    ]  # fmt: skip
    assert lately([busy, idle, idle]) is None and "last 3 steps" in str(lately([busy, idle, idle, idle]))
    assert in_all([idle, busy, busy]) is None and str(in_all([idle, busy])).startswith("little was learnt: 1 of 2")
    assert sum(map(due, range(1000))) == 9
    said = explained([{"frac_reward_zero_std": 1.0, "groups_all_correct": 1.0, "truncated": 0.0, "no_number": 0.0}])
    assert said == "all correct in 100% of groups; what may help: a harder --task, --sampling.samples"


def test_the_causes_that_are_named_fit_what_was_seen() -> None:
    wrong, right, alike, mixed = (
        explained([{"frac_reward_zero_std": equal, "truncated": 1.0} | more])
        for equal, more in (
            (1.0, {"groups_all_wrong": 1.0}),
            (1.0, {"groups_all_correct": 1.0}),
            (1.0, {"reward_abstained": 3}),
            (0.0, {"masked": 1.0}),
        )
    )
    assert "max-new-tokens" in wrong and "max-new-tokens" not in right  # a longer text is no better than a right one
    assert "abstained on 3" in alike and "--reward" in alike and "--task" not in alike
    assert mixed == "the objective masks 100% of tokens; what may help: --objective"


@pytest.mark.parametrize("term", [{"entropy_bonus": 0.1}, {"reference_kl": 0.1}, {"kl_in_reward": 0.1}])
def test_a_gradient_that_no_reward_made_is_no_learning(tmp_path: Path, term: dict[str, Any]) -> None:
    notes = Notes()
    summary = train(tiny_run(steps=5, reward=by_problem, eval_problems=0, **term), tmp_path, notes, keep_model=False)
    assert summary["zero_grad_steps"] < 5 == summary["no_signal_steps"] and learnt_nothing(summary)
    assert summary["warning"].startswith("nothing was learnt from rewards in 5 of 5 steps")
    shown = dict(run_summary(load_run(tmp_path), {}, read_records(tmp_path / METRICS)))
    assert shown["warning"] == summary["warning"] == notes.said[-1]


@in_process
def first_token(problem: Problem, transcript: Transcript) -> RewardResult:
    """Never right; a turn earns what its first letter is."""
    return RewardResult(0.0, turns=(float(ord(transcript.text[:1] or " ") % 2),))


def test_rewards_of_turns_are_a_signal_where_every_total_is_the_same(tmp_path: Path) -> None:
    summary = train(tiny_run(steps=5, task=Letters("never"), reward=first_token, eval_problems=0), tmp_path)
    metrics = read_records(tmp_path / METRICS)
    assert all(m["grad_norm"] > 0 and m["frac_reward_zero_std"] < 1 for m in metrics)
    assert summary["no_signal_steps"] == 0 and summary["warning"] is None and not learnt_nothing(summary)
    same, other = (replace(group(0.0, 0.0), results=(RewardResult(0.0, turns=(0.5,)), RewardResult(0.0, turns=(t,))))
                   for t in (0.5, 0.25))  # fmt: skip
    assert rollout_metrics(1, [same, other])["frac_reward_zero_std"] == 0.5
    assert signal.carrying([same, other], credit_rule(mean)) == 1


@in_process
def by_problem(problem: Problem, text: str) -> float:
    """The same for all completions of a problem, and another for the next problem."""
    return float(int(problem.id.rpartition("-")[2]) % 2)


def test_an_advantage_that_compares_no_group_learns_from_equal_rewards(tmp_path: Path) -> None:
    notes = Notes()
    run = tiny_run(steps=5, reward=by_problem, advantage=reward, eval_problems=0)
    summary = train(run, tmp_path, notes, keep_model=False)
    assert summary["frac_reward_zero_std"] == 1 and summary["zero_grad_steps"] == 0
    assert summary["no_signal_steps"] == 0 and not learnt_nothing(summary)
    assert summary["warning"] is None and summary["warnings"] == [] == notes.said
    assert [m["groups_with_signal"] for m in read_records(tmp_path / METRICS)] == [0.5] * 5  # 0 for the other problems


def share(groups: list[ScoredGroup], values: list[torch.Tensor] | None = None, **rule: Any) -> float:
    advantage = rule.pop("advantage", mean)
    return signal_metrics(groups, credit_rule(advantage, **rule)(groups, values))["groups_with_signal"]


def test_a_group_has_a_signal_where_it_trains_on_an_advantage_that_is_not_0() -> None:
    wrong, right, differ = group(0.0, 0.0), group(1.0, 1.0), group(0.0, 1.0)
    rollout = [wrong, right, differ, differ]
    assert share(rollout) == 0.5 and share(rollout, drop_equal=True) == 0.5
    assert share(rollout, advantage=reward) == 0.75 and share(rollout, advantage=reward, whiten=True) == 1
    assert share([right] * 4, advantage=reward) == 1 and share([right] * 4, advantage=reward, whiten=True) == 0
    assert share(rollout, advantage=lambda rewards: rewards - 0.25) == 1  # a user's own
    value = [torch.zeros(2)] * 8
    assert share(rollout, value, critic=GAE(1.0, 0.95, whiten=False)) == 0.75
    assert share([wrong] * 4, value, critic=GAE(1.0, 0.95)) == 0 and share([wrong, right], value[:4], critic=GAE()) == 1
    other = group(0.0, 1.0)
    assert share([replace(differ, masked=differ.episodes), other]) == 0.5
    late = played(group(1.0, 1.0), turns=(1, 2))  # the same reward after one turn and after two
    assert late.equal_rewards and share([late]) == 0 and share([late], discount=0.5) == 1


def test_a_punishment_of_length_is_a_signal_and_the_kl_to_the_initial_model_is_none() -> None:
    same = group(0.0, 0.0)
    logp = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])]
    near = with_reference_kl([same], logp, 0.1)
    assert share(near) == 1 and share(without_reference_kl(near)) == 0
    long = replace(same, episodes=(completion([1, 2], sample=0), completion([1, 2, 3, 4], sample=1)))
    both = Shaped(2)(with_reference_kl([long], [torch.zeros(2), torch.zeros(4)], 0.1), 4)
    alone, punished = without_reference_kl(both)[0].results, Shaped(2)([long], 4)[0].results
    assert [r.penalties for r in alone] == [r.penalties for r in punished] == [(), (0.0, 0.0, 0.0, -1.0)]
    assert share(without_reference_kl(both)) == 1 and share(mask([same], 2)) == 0


def test_of_two_evaluations_the_one_of_fewer_samples_says_how_sure_their_difference_is() -> None:
    groups = [replace(group(0.0, 1.0), problem=Problem.of_text(str(i), "", "1")) for i in range(30)]
    before = {str(i): 0.0 for i in range(30)}
    lows = [summed_up(groups, 2, step=1, before=before, n_before=n).difference_low for n in (1, 2, 8, None)]
    assert lows[0] is not None and lows[0] < lows[1] == lows[2] == lows[3]


def test_shares_of_the_steps_without_a_gradient_are_said_to_be_of_these_steps() -> None:
    """Half of the run's groups are all wrong, and all of those in its steps without a gradient."""
    idle, busy = {"grad_norm": 0.0, "groups_all_wrong": 1.0}, {"grad_norm": 1.0, "groups_all_wrong": 0.0}
    bonus = {"grad_norm": 1.0, "groups_with_signal": 0.0, "groups_all_wrong": 1.0}
    for steps in ([idle, busy], [busy, bonus]):
        assert "; in these steps: all wrong in 100% of groups;" in str(in_all(steps))
    assert "in these steps" not in str(in_all([idle, idle]))
    assert str(in_all([{"grad_norm": 0.0}, busy])).endswith("in these steps: no cause shows in the metrics")


def test_what_a_step_trained_on_decides_whether_it_had_a_signal() -> None:
    equal = {"grad_norm": 0.1, "frac_reward_zero_std": 1.0}
    assert without_signal(equal) and not without_signal(equal | {"groups_with_signal": 0.1})
    critic = equal | {"value_mean": 0.2}
    assert not without_signal(critic) and without_signal(critic | {"groups_with_signal": 0.0})


def test_a_critic_learns_from_equal_rewards_unless_they_are_those_of_the_whole_run() -> None:
    step = {"grad_norm": 1.0, "frac_reward_zero_std": 1.0, "reward_std": 0.0, "value_mean": 0.2}
    same, other = step | {"reward_mean": 0.3}, step | {"reward_mean": 0.4}
    assert in_all([same, same, other]) is None and lately([same, same, other]) is None
    assert str(in_all([same] * 3)).startswith("nothing was learnt from rewards in 3 of 3 steps: every completion of")
    without_baseline = {name: value for name, value in same.items() if name != "value_mean"} | {"groups_with_signal": 1}
    assert in_all([without_baseline] * 3) == in_all([same] * 3)


def test_rewards_that_differ_by_rounding_are_equal_to_the_metric_as_to_the_advantage() -> None:
    record = rollout_metrics(1, [group(0.5, 0.5 + 2e-7), group(0.5, 0.6)])
    assert record["frac_reward_zero_std"] == 0.5


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan])
def test_a_clip_that_leaves_no_gradient_is_refused(norm: float) -> None:
    with pytest.raises(InputError, match=r"max_grad_norm=.*above 0; inf turns clipping off"):
        tiny_run(max_grad_norm=norm)
    with pytest.raises(InputError, match="above 0"):
        take_step(torch.optim.SGD([torch.zeros(1)]), [], 0.1, norm)


def test_a_clip_that_is_off_is_written_and_read_back() -> None:
    run = tiny_run(max_grad_norm=math.inf)
    assert from_json(json.loads(json.dumps(to_json(run), allow_nan=False))) == run


def test_a_learning_rate_that_trains_nothing_is_said() -> None:
    assert "will not change" in str(trains_little(configure(Run(), optimizer=AdamW(0.0))))
    assert "ends at 50%" in str(trains_little(configure(Run(), schedule=Constant(warmup=40), steps=20)))
    assert trains_little(configure(Run(), schedule=Constant(warmup=20), steps=20)) is None


def group(*rewards: float) -> ScoredGroup:
    completions = tuple(completion([1, 2], sample=i) for i in range(len(rewards)))
    return ScoredGroup(Problem.of_text("p", "", "1"), completions, tuple(map(RewardResult, rewards)))


def played(scored: ScoredGroup, turns: tuple[int, int]) -> ScoredGroup:
    """The group with episodes of so many turns, of a token each."""
    episodes = tuple(replace(completion(list(range(1, 1 + n)), sample=i), turns=(1,) * n) for i, n in enumerate(turns))
    return replace(scored, episodes=episodes)


def test_the_doctor_counts_the_groups_that_the_run_would_train_on() -> None:
    right = [group(1.0, 1.0)] * signal.MOST
    assert signal.signal(right, credit_rule(reward)).values["share"] == 1
    assert signal.signal(right, credit_rule(reward, whiten=True)).verdict == "note"
    mixed = [group(1.0, 1.0), *[group(0.0, 0.0)] * 7, *[group(0.0, 0.0)] * 8]  # whitened by eight, as in two steps
    assert signal.carrying(mixed, credit_rule(reward, whiten=True)) == 8
    assert len(list(signal.sampled(lambda part: right[:8], credit_rule(reward)))) == signal.FIRST


def test_the_doctor_compares_the_completions_of_all_prompts_where_there_is_a_critic() -> None:
    """Groups of one, too, and groups each of which is equal in itself."""
    apart, alike = [group(1.0), *[group(0.0)] * 7], [group(0.0)] * 8
    assert signal.carrying(apart, None) == 8 and signal.carrying(alike, None) == 0
    assert signal.carrying([*alike, *apart], None) == 8  # the first eight are one step, the others the next
    with_turns = replace(group(1.0), results=(RewardResult(0.0, turns=(1.0,)),))
    assert signal.carrying([*[group(1.0)] * 7, with_turns], None) == 8
    unscored = replace(group(1.0), episodes=(), results=())
    assert signal.carrying([unscored, *apart[:7]], None) == 7
    hopeless = list(signal.sampled(lambda part: alike, None))
    found = signal.signal(hopeless, None)
    assert len(hopeless) == signal.MOST and found.verdict == "note" and found.values["share"] == 0
    assert "--prompts" in found.advice and "--sampling.samples" not in found.advice
    assert len(list(signal.sampled(lambda part: apart, None))) == 8 and signal.signal(apart, None).verdict == "ok"


def test_the_doctor_looks_further_where_few_groups_carry_a_signal_and_warns_of_a_hopeless_task() -> None:
    hopeless = list(signal.sampled(lambda part: [group(0.0, 0.0)] * signal.FIRST, credit_rule(mean)))
    assert len(hopeless) == signal.MOST
    found = signal.signal(hopeless, credit_rule(mean))
    assert found.verdict == "note" and "--sampling.max-new-tokens" in found.advice and found.values["share"] == 0
    right = signal.signal([group(1.0, 1.0)] * signal.MOST, credit_rule(mean)).advice
    alike = signal.signal([group(0.3, 0.3)] * signal.MOST, credit_rule(mean)).advice
    assert "a harder --task" in right and "max-new-tokens" not in right
    assert "--reward" in alike and "--task" not in alike
    sound = [group(0.0, 1.0), *[group(0.0, 0.0)] * 7]
    assert (
        list(signal.sampled(lambda part: sound, credit_rule(mean))) == sound
        and signal.signal(sound, credit_rule(mean)).verdict == "ok"
    )
    assert signal.signal([group(0.0, 0.0)] * 8, credit_rule(mean)).verdict == "ok"  # of so few nothing can be said
    generator = torch.Generator().manual_seed(0)
    carrying = torch.rand(2000, 32, generator=generator) < 0.25
    assert sum(signal.too_few(int(n), 32) for n in carrying.sum(1)) / 2000 < 0.02
