"""Several processes as a user starts them, with torchrun and accelerate: servers, and what fails on one of them."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from drpo import cli
from drpo.model import loading
from drpo.model.names import TINY
from support.fake_vllm import FakeServer
from support.pictures import without_pictures
from support.processes import assert_nearly_same_run

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--rdzv_backend", "c10d"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1", "--num_processes"),
)
# In float32, and with steps so small that AdamW's first ones, whose sign is that of rounding, cannot lead elsewhere.
EXACT = ("--precision", "fp32", "--rollout-precision", "fp32", "--learning-rate", "2e-4")
SMOKE = ("train", "smoke", "--steps", "10", *EXACT, "--no-doctor", "--plain")


def launch(*command: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with without_pictures():
        assert cli.main([*SMOKE, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("launcher", "where"),
    [
        pytest.param([*TORCHRUN, "2", "--max-restarts", "1"], "6", marks=pytest.mark.slow),
        pytest.param([*ACCELERATE, "2", "--max_restarts", "1"], "6", marks=pytest.mark.slow),
        pytest.param([*TORCHRUN, "3", "--max-restarts", "1"], "evaluation", marks=pytest.mark.slow),
        pytest.param([*TORCHRUN, "1", "--max-restarts", "1"], "6", marks=pytest.mark.slow),
    ],
)
def test_an_engine_that_dies_on_one_process_costs_no_step(launcher: list[str], where: str, alone: Path, tmp_path: Path):
    """All processes save what they have before the launcher begins again, with the same command."""
    done = launch(
        *launcher, str(ROOT / "tests" / "support" / "breaks.py"), where, *SMOKE, "--out", str(tmp_path / "run")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "engine: it is dead" in done.stderr
    assert "resumed after step 6" in done.stdout or where != "6", done.stdout[-3000:]
    assert_nearly_same_run(alone, tmp_path / "run")


@pytest.mark.slow
def test_without_restarts_the_run_ends_with_one_line_and_a_checkpoint(tmp_path: Path):
    done = launch(
        *TORCHRUN, "2", str(ROOT / "tests" / "support" / "breaks.py"), "6", *SMOKE, "--out", str(tmp_path / "run")
    )
    assert done.returncode != 0
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000006"]
    said = sorted(line for line in done.stderr.splitlines() if line.startswith("drpo: "))
    assert len(said) == 2 and "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]
    assert said[0].startswith("drpo: engine: it is dead; `drpo train --resume")
    assert said[1].startswith("drpo: rank 1: engine: it is dead")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "shard"), [(2, "fsdp"), (3, "none")])
def test_servers_sample_for_several_processes(processes: int, shard: str, tmp_path: Path):
    with ExitStack() as stack:
        servers = [FakeServer(loading.load(TINY)[0]) for _ in range(2)]
        for server in servers:
            stack.callback(server.stop)
        assert cli.main([*SMOKE, "--engine", servers[0].address, "--out", str(tmp_path / "one")]) == 0
        before = [len(server.asked) for server in servers]
        both = ",".join(server.address for server in servers)
        done = launch(
            *TORCHRUN, str(processes), "-m", "drpo", *SMOKE, "--engine", both, "--shard", shard,
            "--out", str(tmp_path / "several"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        drawn = [len(server.asked) - n for server, n in zip(servers, before, strict=True)]
    assert drawn[0] == drawn[1] > 0
    assert_nearly_same_run(tmp_path / "one", tmp_path / "several")
