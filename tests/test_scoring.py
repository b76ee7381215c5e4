"""Rewards that fail, in whole runs: what is counted, what is left, and that the run ends as it should."""

import json
from pathlib import Path

import pytest

from drpo import cli
from drpo.errors import InputError
from drpo.rewards import RewardConfig
from drpo.train.config import from_json, to_json
from drpo.train.loop import train
from drpo.train.records import CHECKPOINTS, METRICS, ROLLOUTS, read_records
from drpo.train.stored import latest
from support import naughty_rewards
from support.worlds import Letters, few_run, sampling

COUNTED = {"raised": 8, "timed_out": 8, "died": 4, "not_finite": 4, "not_a_number": 8}
"""Of the misdeeds of `naughty_rewards.in_turn`, each done to a group of 4."""


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("policy", ["drop", "zero"])
def test_a_run_under_every_misdeed_ends_normally_with_each_counted(tmp_path: Path, monkeypatch, capsys, policy: str):
    monkeypatch.chdir(tmp_path)
    options = {"reward": "support.naughty_rewards:in_turn", "reward_pool.seconds": "3", "reward_pool.processes": "2"}
    options |= {"reward_pool.memory-gb": "2", "reward_pool.on-failure": policy, "out": "run", "precision": "fp32"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert cli.main(["train", "smoke", "--plain", "--no-doctor", *words]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["finished"] and summary["steps"] == 4
    assert summary["reward_failures"] == COUNTED and summary["reward_failed"] == sum(COUNTED.values())
    metrics = read_records(Path("run") / METRICS)
    assert {kind: sum(m[f"reward_{kind}"] for m in metrics) for kind in COUNTED} == COUNTED
    assert sum(m["reward_abstained"] for m in metrics) == 4
    rollouts = read_records(Path("run") / ROLLOUTS)
    assert len(rollouts) == 64 and sum(r["failure"] is not None for r in rollouts) == sum(COUNTED.values())
    assert {r["reward"] for r in rollouts if r["failure"]} == ({0.0} if policy == "zero" else {None})
    assert "8 raised, 8 timed out, 4 died, 4 not finite, 8 not a number" in " ".join(capsys.readouterr().out.split())


def test_an_error_ends_the_run_in_one_line_and_loses_nothing(tmp_path: Path):
    train(few_run(task=Letters(), eval_problems=0, steps=2), tmp_path)
    run = few_run(task=Letters("raising"), reward_pool=RewardConfig(on_failure="error"), eval_problems=0, steps=4)
    with pytest.raises(InputError, match=r"failed on 8 of 8 completions, .*: RuntimeError: no verdict today; ") as said:
        train(run, tmp_path)
    assert "\n" not in str(said.value)
    assert latest(tmp_path / CHECKPOINTS).name == "step-000002"
    assert len(read_records(tmp_path / METRICS)) == 2


def test_scoring_is_written_and_read_back_and_old_runs_have_the_defaults():
    run = few_run(reward_pool=RewardConfig(3, 1.5, 0.5, "zero"), sampling=sampling())
    record = json.loads(json.dumps(to_json(run)))
    assert from_json(record) == run
    del record["rewards"]["pool"]
    assert from_json(record).rewards.pool == RewardConfig()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--reward-pool.processes", "0"), "reward_pool.processes=0"),
        (("--reward-pool.seconds", "-1"), "reward_pool.seconds=-1"),
        (("--reward-pool.memory-gb", "nan"), "reward_pool.memory_gb=nan"),
        (("--reward-pool.on-failure", "ignore"), "ignore"),
        (("--reward-pool.second", "1"), "--reward-pool.seconds"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(capsys, words, said):
    assert cli.main(["train", "smoke", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_every_misdeed_has_its_turn():
    assert set(naughty_rewards.TURNS) <= set(naughty_rewards.DEEDS) | set(naughty_rewards.VALUES) | {"raise"}
    assert len(naughty_rewards.TURNS) == 12
