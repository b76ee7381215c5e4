"""`benchmarks.gpu_day` without a GPU: its parts' cases, limits of time, failures, and what it takes for a fault."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from benchmarks import gpu_day
from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.gpu_day import PARTS, Part, faults, main
from benchmarks.parts import Scale
from benchmarks.table import render
from benchmarks.worker_pool import WorkerError, WorkerPool
from benchmarks.workers import kernels
from benchmarks.workers.commands import output_of
from benchmarks.workers.gpu_tests import outcome
from benchmarks.workers.sharded_updates import updates

from drpo.ranks import SINGLE_PROCESS

GPU = Scale(quick=False, repeats=0, cuda=True, memory_bytes=139 * 2**30, fast_bf16=True)
MACHINE = {"accelerator": "NVIDIA H200", "memory_gib": 139, "system": "Linux", "python": "3", "torch": "2", "flags": {}}
SHARDED = {"prompts": 2, "samples": 2, "prompt_tokens": 5, "new_tokens": 3, "micro_batch_tokens": 12, "updates": 2}


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command tells its workers by variables is forgotten afterwards."""
    for name in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "")


def test_on_a_gpu_every_part_has_its_cases_and_they_fit_ten_minutes():
    assert sum(part.seconds for part in PARTS.values()) == 60 * gpu_day.MINUTES
    cases = {name: part.cases(GPU, part.seconds) for name, part in PARTS.items()}
    assert {case.part for found in cases.values() for case in found} == PARTS.keys()
    for case in cases["head"]:
        assert "V 151,936" in case.name and {"log_softmax", "Liger GRPO", "CCE"} <= {e.name for e in case.entrants}
    (step,) = cases["step"]
    assert step.entrants[0].worker.setup["model"] == "benchmarks.qwen2:half_billion" and "drpo, vLLM" in step.skipped
    (waiting,) = cases["tests"]
    assert waiting.entrants[0].request["marker"] == "gpu"


def test_vllm_has_a_case_of_its_own_where_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_day, "find_spec", lambda name: "a module")
    alone, beside = gpu_day.steps(GPU, 100)
    assert [e.name for e in alone.entrants] == ["drpo", "matrix products"] and not alone.skipped
    assert beside.entrants[-1].worker.setup["engine"] == "vllm" and beside.name != alone.name


def test_a_part_that_fails_ends_no_other(monkeypatch, rehearsal: None, tmp_path: Path, capsys):
    def broken(scale: Scale, seconds: float) -> list[Case]:
        raise RuntimeError("no kernel image")

    entrants = (Entrant("a", Worker(OURS, "no_such_module", {}), {}), Entrant("CCE", Worker("cce", "x", {}), {}))
    steps = Case("step", "x", "a", entrants, {"precision": "fp32"})
    monkeypatch.setattr(gpu_day, "PARTS", {"head": Part(broken, 1, 1), "step": Part(lambda *_: [steps], 1, 1)})
    path = tmp_path / "day.json"
    assert main(["--device", "cpu", "--tiny", "--only", "head,step", "--out", str(path)]) == 1
    first, second = json.loads(path.read_text())["cases"]
    assert first["failures"] == {"head": "RuntimeError: no kernel image"}
    assert "No module named" in second["failures"]["a"] and "not installed" in second["failures"]["CCE"]
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 2 and lines[0] == "head: the whole part: head: RuntimeError: no kernel image"


def test_who_takes_too_long_is_ended_and_nobody_is_started_afterwards():
    end = time.monotonic() + 0.2
    with WorkerPool({OURS: Path(sys.executable)}, 1, lambda: end - time.monotonic()) as pool:
        with pytest.raises(WorkerError, match="did not answer"):
            pool.get(Worker(OURS, "rates", {}))  # importing torch takes longer
        with pytest.raises(WorkerError, match="no time was left"):
            pool.get(Worker(OURS, "head", {}))


def test_a_command_that_is_late_is_ended_with_what_it_began():
    text, done = output_of(["sh", "-c", "echo begun; sleep 60 & wait"], time.time() + 0.2)
    assert (text, done) == ("begun\n", False)


def test_outcomes_of_tests_are_counted_as_far_as_they_came():
    text = "a.py::t[1 x] PASSED [ 1%]\na.py::u SKIPPED (no GPU) [ 2%]\nb.py::v ERROR [ 3%]\nb.py::w "
    assert outcome(text) == {"passed": 1, "failed": 1, "skipped": 1, "names": ["b.py::v"]}


def record(part: str, answer: dict, **failures: str) -> dict:
    return {
        "part": part, "name": "x", "baseline": "1 process", "entrants": ["1 process"], "parameters": {}, "about": {},
        "failures": failures, "rounds": [{"1 process": answer}],
    }  # fmt: skip


def test_faults_and_tables():
    def ways(divided: float) -> dict:
        made = {"seconds": 2.0, "peak_bytes": None}
        return {"whole": {**made, "grad_norms": [1.0]}, "FSDP2": {**made, "grad_norms": [divided]}}

    wrong = {"errors": {"logp": 1.0}, "plain": {"logp": 0.1}, "within": False, "backend": "triton"}
    cases = [
        record("kernels", wrong),
        record("sharding", {"seconds": 2.0, "backend": "nccl", "ways": ways(1.01)}),
        record("sharding", {"seconds": 2.0, "backend": "nccl", "ways": ways(1.1)}),
        record("sharding", {"seconds": 2.0, "backend": "nccl", "ways": ways(float("nan"))}),
        record("head", {"seconds": 1.0}, CCE="out of memory", drpo="out of memory"),
        record("head", {"seconds": 1.0}, CCE="x", drpo="skipped: of no use"),
    ]
    assert [len(faults(case)) for case in cases] == [1, 0, 1, 1, 1, 0]
    page = render({"machine": MACHINE, "cases": cases[:2]})
    assert "| x | 1 process | logp | 1.0e+00 | 1.0e-01 | **no** | triton |" in page
    assert "| x | 1 process, FSDP2 | nccl | 2.00 | 1.00 | 1.01 | - |" in page


@pytest.mark.parametrize("check", ["rows", "linear_logprob", "linear_policy_loss"])
def test_kernels_are_compared_with_float64(check: str, monkeypatch: pytest.MonkeyPatch):
    request = {"check": check, "dtype": "fp32", "tokens": 4, "vocabulary": 50, "hidden": 8, "row": 4}
    found = kernels.compare(request)
    assert found["within"] and 0 < max(found["errors"].values()) < 1e-5
    right = kernels.relative
    monkeypatch.setattr(kernels, "relative", lambda a, b: {n: 2.1 * x + 1e-5 for n, x in right(a, b).items()})
    assert kernels.compare(request)["within"]  # the plain way's errors are the budget
    monkeypatch.setattr(kernels, "relative", lambda a, b: {n: float("nan") for n in b})
    assert not kernels.compare(request)["within"]


def test_a_divided_model_has_the_gradients_of_a_whole_one():
    setup = {"model": "benchmarks.qwen2:tiny", "precision": "fp32", **SHARDED}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole, divided = (updates(setup, SINGLE_PROCESS, divided=way) for way in (False, True))
    finally:
        dist.destroy_process_group()
    assert divided["grad_norms"] == pytest.approx(whole["grad_norms"], rel=1e-4) and min(whole["grad_norms"]) > 0
    assert divided["losses"] == pytest.approx(whole["losses"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "heads"], "only='heads'; did you mean 'head'?"),
        (["--minutes", "0"], "minutes=0: must be above 0"),
        (["--device", "cpu"], "add --tiny"),
        (["--out", "day.txt"], "must end in .json"),
        (["--fast"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("gpu_day: ") and message in error


def test_without_a_gpu_it_says_how_to_rehearse(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([]) == 2
    assert "--device cpu --tiny rehearses it" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_day_on_a_cpu(rehearsal: None, tmp_path: Path):
    path = tmp_path / "day.json"
    assert main(["--device", "cpu", "--tiny", "--out", str(path)]) == 0
    found = {case["part"]: case for case in json.loads(path.read_text())["cases"]}
    assert found.keys() == PARTS.keys()
    assert set(found["head"]["rounds"][0]) == {"products alone", "linear_logprob", "linear_policy_loss", "log_softmax"}
    assert set(found["step"]["rounds"][0]) >= {"drpo", "matrix products"}
    assert set(found["sharding"]["rounds"][0]) == {"1 process", "2 processes"}
    assert found["tests"]["rounds"][0]["pytest"]["passed"] > 1
    assert str(tmp_path) not in path.read_text()
