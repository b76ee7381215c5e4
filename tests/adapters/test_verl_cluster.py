"""verl's own trainer on Ray with a vLLM rollout, whole, on a CPU: two rollouts of `cluster/verl/demo.py`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

CLUSTER = Path(__file__).resolve().parents[2] / "cluster" / "verl"
TOKENS = "actor/drpo/loss_tokens/drpo_0.2"


@pytest.mark.adapters
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs verl with vLLM: make test-verl-cluster")
def test_verl_trains_from_its_command_line_to_a_checkpoint_that_is_evaluated(tmp_path: Path):
    pytest.importorskip("verl")
    command = [sys.executable, str(CLUSTER / "demo.py"), "--out", str(tmp_path / "run"), "--steps", "2"]
    done = subprocess.run([*command, "--module", "drpo.adapters.verl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    first, second = [line for line in record["log"] if TOKENS in line]
    for step in (first, second):
        assert step[TOKENS] > 0 and step["actor/drpo/unscored"] == 0
        assert 0 <= step["critic/rewards/mean"] <= 1
        # Four updates: the sampler's weights at the first, three steps away from them at the last.
        assert 0 < step["actor/drpo/prob_diff_max"] < 0.5
    assert "problems 12" in [" ".join(line.split()) for line in record["eval"]["output"]]
