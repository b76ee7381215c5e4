"""cluster/trl: every setting with every method is a sound configuration, and the script trains."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.adapters
trl = pytest.importorskip("trl")

import yaml  # noqa: E402
from accelerate.commands.config.config_args import load_config_from_file  # noqa: E402

from adapters.pages import run_page  # noqa: E402
from adapters.trl_runs import config  # noqa: E402
from drpo import cli, objectives  # noqa: E402
from drpo.adapters.trl import DRPOConfig  # noqa: E402
from drpo.model import loading  # noqa: E402
from drpo.spec import parse_spec  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "cluster" / "trl"
METHODS = {
    "drpo": "drpo(12.5)",
    "drpo-tight": "drpo(0.2)",
    "dppo": "dppo(0.15)",
    "spo": "spo(12.5)",
    "ppo": "ppo(0.2, 0.28)",
    "none": "none",
}
SETTINGS = ("demo", "qwen3_4b")


def launch(*arguments: str, folder: Path, how: str = f"{sys.executable}") -> subprocess.CompletedProcess[str]:
    own = {
        "LAUNCH": how,
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]),
    }
    command = [str(RECIPES / "run.sh"), *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_setting_with_every_method(setting: str, method: str, tmp_path: Path):
    said = launch(setting, method, "--use_cpu", "true", folder=tmp_path, how="echo").stdout
    written = yaml.safe_load((RECIPES / f"{setting}.yaml").read_text())
    fields = {name: value for name, value in written.items() if name in DRPOConfig.__dataclass_fields__}
    assert set(written) - set(fields) <= {"model", "task", "sampler", "eval_problems"}
    assert f"--objective {METHODS[method]} " in said
    made = DRPOConfig(**(fields | {"objective": METHODS[method], "output_dir": str(tmp_path), "use_cpu": True}))
    assert parse_spec(made.objective, objectives.REGISTRY) is not None
    per_update = made.per_device_train_batch_size * made.gradient_accumulation_steps
    assert made.steps_per_generation // made.gradient_accumulation_steps == 4  # updates of a rollout
    assert per_update in (32, 16)  # qwen3_4b: on each of 8 processes


def test_the_launcher_s_file_is_one_that_accelerate_reads():
    read = load_config_from_file(str(RECIPES / "fsdp2.yaml"))
    assert read.num_processes == 8 and read.fsdp_config["fsdp_version"] == 2


def test_the_demo_s_script_trains_through_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ["--model", "tiny", "--max_steps", "8", "--eval_problems", "6", "--output_dir", str(tmp_path / "run")]
    done = launch("demo", "drpo-tight", *small, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert [e["step"] for e in figures["evaluations"]] == [0, 2] and figures["objective"] == "drpo(0.2)"
    assert any("drpo/prob_diff_mean" in entry for entry in figures["log"])
    assert cli.main(["eval", str(tmp_path / "run"), "--task", "addition(0, 9)", "--problems", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_problems"] == 3


def test_two_processes_train(tmp_path: Path):
    """DDP over gloo, TRL's own generate; each takes its share of every rollout."""
    model, tokenizer = loading.tiny()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    small = {
        "model": tmp_path / "model",
        "sampler": "trl",
        "recompute_behavior_logp": "true",
        "max_steps": 4,
        "eval_problems": 0,
        "max_completion_length": 8,
        "bf16": "false",
        "output_dir": tmp_path / "run",
    }
    given = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    two = shlex.join([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
    done = launch("demo", "drpo-tight", *given, folder=tmp_path, how=two)
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads((tmp_path / "run" / "figures.json").read_text())["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [4]
    trained, _ = loading.load(str(tmp_path / "run"))
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "dropo"], "unknown method 'dropo'"),
        (["qwen9", "drpo"], "there are: demo qwen3_4b"),
        (["demo", "drpo", "--sampler", "mine"], "sampler='mine': must be 'trl' or 'engine'"),
        (["demo", "drpo", "--task", "additoin(1, 2)"], "did you mean 'addition'"),
        (["demo", "drpo", "--epsilon", "0.2"], "epsilon=0.2: the trust region is the objective's"),
        (["demo", "drpo", "--max_steps", "-1"], "max_steps=-1: say how many updates"),
        (["demo", "drpo", "--sampler", "trl", "--model", "tiny-model"], "eval_problems=200: needs sampler=engine"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str, tmp_path: Path):
    done = launch(*arguments, folder=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("train.py:", "run.sh:"))]
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    names: dict[str, Any] = run_page("trl")
    assert names["trainer"].state.global_step == 2
    assert isinstance(config(tmp_path), DRPOConfig)
