"""The page's table is what the tests of the adapters found, and all of it is rounding."""

import json

from adapters import parity
from adapters.cases import SPECS


def test_the_page_shows_what_was_found():
    results = json.loads(parity.FIGURES.read_text())
    assert parity.BEGIN + parity.table(results) + parity.END in parity.PAGE.read_text()
    errors = [error for result in results for error in result["error"].values()]
    assert max(errors) < 1e-6 and min(errors) > 0


def test_every_framework_that_is_called_tested_is_in_it():
    results = json.loads(parity.FIGURES.read_text())
    versions: dict[str, set[str]] = {}
    for result in results:
        versions.setdefault(result["framework"].split(",")[0].split(" (")[0], set()).add(result["version"])
    assert versions["TRL"] == {"1.10.0", "1.14.2", "1.16.0"} and versions["verl"] == {"0.9.1"}
    assert versions["SkyRL"] == {"0.3.0", "0.4.0"} and versions["Tinker"] == {"0.32.0", "0.38.0"}
    assert {"prime-rl", "OpenRLHF"} <= set(versions)
    for result in results:
        assert len(set(result["error"]) & set(SPECS)) >= 4, result["framework"]


def test_what_ran_end_to_end_has_its_figures():
    results = {(result["framework"], result["version"]) for result in json.loads(parity.FIGURES.read_text())}
    assert set(parity.RAN) <= results
    demo = parity.ROOT / "cluster" / "trl" / "results" / "demo.json"
    run = json.loads(demo.read_text())
    assert run["trl"] == "1.16.0" and run["log"][-1]["step"] == 64 and len(run["evaluations"]) == 2
    assert "loss_type: dr_grpo" in (parity.ROOT / "cluster" / "trl" / "demo.yaml").read_text()


def test_verls_run_is_whole_and_its_reward_rises():
    run = json.loads((parity.ROOT / "cluster" / "verl" / "results" / "demo.json").read_text())
    assert run["versions"]["verl"] == "0.9.1" and run["command"][2] == "verl.trainer.main_ppo"
    assert any(argument.endswith('.objective="drpo(0.2)"') for argument in run["command"])
    assert f"trainer.total_training_steps={run['log'][-1]['step']}" in run["command"]  # it went to its last step
    assert "eval" in run["eval"]["command"] and any("problems" in line for line in run["eval"]["output"])
    steps = [line for line in run["log"] if line["step"]]
    assert all(line["actor/drpo/loss_tokens/drpo_0.2"] > 0 and line["actor/drpo/unscored"] == 0 for line in steps)
    rewards = [line["critic/rewards/mean"] for line in steps]
    assert sum(rewards[-5:]) > 5 * sum(rewards[:5])
    before, after = (line["val-core/addition/acc/mean@16"] for line in (run["log"][0], run["log"][-1]))
    assert after > before and any(f"{after:.1%}" in line for line in run["eval"]["output"])  # of the checkpoint


def test_openrlhfs_run_is_whole_and_its_reward_rises():
    run = json.loads((parity.ROOT / "cluster" / "openrlhf" / "results" / "demo.json").read_text())
    assert run["versions"]["openrlhf"] == "0.11.2" and run["command"][2:5] == [
        "drpo.adapters.openrlhf",
        "--drpo-objective",
        "drpo(0.2)",
    ]
    steps = [line for line in run["log"] if "train/rollout/reward_mean" in line]
    assert len(steps) == 40
    assert all(line["train/drpo/loss_tokens/drpo_0.2"] > 0 and line["train/drpo/unscored"] == 0 for line in steps)
    rewards = [line["train/rollout/reward_mean"] for line in steps]
    assert sum(rewards[-10:]) > 2 * sum(rewards[:10])
    (validated,) = (line["eval/eval_addition_pass1"] for line in run["log"] if "eval/eval_addition_pass1" in line)
    assert any(f"{validated:.1%}" in line for line in run["eval"]["output"])  # of the checkpoint
