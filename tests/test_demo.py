"""The demo does what the README says, for three seeds. Minutes each: `make test-slow`.

How long it takes is not asserted here: that is what `training_seconds` in each summary says.
"""

import json
from pathlib import Path

import pytest

from drpo import cli


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_smollm2_learns_to_add(seed: int, tmp_path: Path):
    assert cli.main(["train", "demo", "--seed", str(seed), "--out", str(tmp_path / "demo")]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    before, after = summary["evaluation_before"], summary["evaluation_after"]
    print(
        f"seed {seed}: {before['reward_mean']:.3f} -> {after['reward_mean']:.3f}, {summary['training_seconds']:.0f} s"
    )
    assert before["n_problems"] == after["n_problems"] == 200
    assert before["reward_mean"] < 0.30
    assert after["reward_mean"] >= 0.65
