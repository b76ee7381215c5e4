"""What a command imports before it answers: nothing heavy, or torch alone where it builds a configuration."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from drpo.train import loop
from support.worlds import tiny_run

# Those that a lazy import stands in for are counted where one of their own modules is there.
HEAVY = ("torch", "transformers", "numpy", "scipy", "matplotlib", "plotly", "pyarrow", "sympy", "math_verify")
LAZY = ("datasets", "reasoning_gym", "peft")
SCRIPT = """
import contextlib, io, json, sys
from drpo import cli
for line in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        cli.main(line)
    assert said.getvalue()
    print(json.dumps([line, sorted(sys.modules)]))
"""
ANSWERED_AT_ONCE = [
    *(["--help"], ["trian"], ["recipes"], ["train", "--help"], ["train", "dmo"], ["train", "--resume", "--help"]),
    *(["sft"], ["sft", "--help"], ["sft", "nowhere.jsonl"], ["sft", "--resume", "nowhere"]),
    *(["train", "nowhere.py"], ["train", "--data", "nowhere.jsonl"], ["init", "nowhere.jsonl"], ["init", "--help"]),
    *(["train", "demo", "--stepz", "3"], ["train", "--resume", "nowhere"], ["eval", "./nowhere"], ["watch", "nowhere"]),
    *([c, "--help"] for c in ("watch", "export", "verify", "report", "doctor", "serve-rollouts", "compare", "chat")),
    *([c, "--help"] for c in ("weights", "replay", "env", "explain", "autopsy")),
    *(["autopsy"], ["autopsy", "nowhere.jsonl"]),
    *(
        ["train", "--from", "--help"],
        ["train", "--from", "nowhere"],
        ["train", "--resume", "nowhere", "--task", "gsm8k"],
    ),
    *(["explain"], ["explain", "k3"], ["explain", "entropy_colapse"]),
]


def loaded(lines: list[list[str]], heavy: tuple[str, ...]) -> dict[str, list[str]]:
    """Which heavy libraries are there after each command, of one process that answers all."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(lines)], capture_output=True, text=True, check=True)
    found = {}
    for answer in done.stdout.splitlines():
        line, modules = json.loads(answer)
        inner = {name.split(".")[0] for name in modules if "." in name}
        found[" ".join(line)] = [name for name in (*heavy, *LAZY) if name in (inner if name in LAZY else modules)]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "run"
    loop.train(tiny_run(steps=1, eval_problems=2), folder)
    return folder


def test_help_typos_and_what_reads_records_import_nothing_heavy(run: Path):
    of_the_run = [["watch", str(run), "--once"], ["verify", str(run)]]
    assert set(map(tuple, loaded(ANSWERED_AT_ONCE + of_the_run, HEAVY).values())) == {()}


def test_a_configuration_imports_torch_alone_and_a_report_no_models(run: Path):
    lines = [["train", "demo", "--help"], ["compare", "gsm8k", "--help"], ["eval", "--help"], ["report", str(run)]]
    *configurations, report = loaded(lines, (*HEAVY, "transformers.modeling_utils")).values()
    assert set(map(tuple, configurations)) == {("torch", "numpy")}  # torch imports numpy
    assert report == ["torch", "transformers", "numpy", "plotly"]
