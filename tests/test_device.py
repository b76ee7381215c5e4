"""Which device a run takes, and what Apple's GPU, by a stand-in, is asked to do."""

from pathlib import Path

import pytest
import torch

from drpo.errors import InputError
from drpo.model.device import choose_device
from drpo.model.precision import resolve_precision
from drpo.rollout.vllm import device_options
from drpo.train import loop
from drpo.train.config import configure
from drpo.train.records import read_records
from support.apple import MPS, Apple
from support.hostile import refused
from support.worlds import few_run


def there(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "processes", "kind"),
    [
        (True, False, 2, "cuda"),
        (True, True, 1, "cuda"),
        (False, True, 1, "mps"),
        (False, True, 2, "cpu"),
        (False, False, 1, "cpu"),
    ],
)
def test_auto_is_the_first_device_that_is_there(monkeypatch, cuda, mps, processes, kind) -> None:
    there(monkeypatch, cuda, mps)
    assert choose_device("auto", processes).type == kind and choose_device("cpu", processes).type == "cpu"


def test_what_is_not_there_or_cannot_work_there_is_refused(monkeypatch) -> None:
    there(monkeypatch, cuda=False, mps=False)
    assert "finds none here; it finds cpu" in refused(["train", "smoke", "--device", "mps"])
    assert "did you mean 'mps'" in refused(["eval", "tiny", "--task", "addition(1, 9)", "--device", "mpss"])
    there(monkeypatch, cuda=False, mps=True)
    with pytest.raises(InputError, match=r"device=mps: 2 processes cannot train on it together; set --device cpu"):
        choose_device("mps", 2)
    for name in ("fp8", "fp8_weights"):
        with pytest.raises(InputError, match=rf"precision={name}: Apple's GPUs have no floating point of 8 bits"):
            resolve_precision(name, MPS)
    assert resolve_precision("auto", MPS).dtype == torch.float32 and resolve_precision("bf16", MPS).weights is None
    with pytest.raises(InputError, match=r"engine='vllm': it has no Apple GPU"):
        device_options(MPS)


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-5), pytest.param("bf16", 0.02, marks=pytest.mark.slow)])
def test_a_run_on_apples_gpu_needs_no_float64_there_and_does_what_the_cpu_does(
    monkeypatch, tmp_path: Path, precision: str, apart: float
) -> None:
    run = few_run(steps=1, eval_problems=1, prompts=2, **{"sampling.samples": 2})
    run = configure(run, rollout_precision=precision, precision=precision)
    loop.train(configure(run, device="cpu"), tmp_path / "cpu")
    there(monkeypatch, cuda=False, mps=True)
    with Apple(monkeypatch) as apple:
        loop.train(run, tmp_path / "mps")
    assert apple.n_calls > 1000
    known = {"metrics": ("reward_mean", "prob_diff_mean", "entropy"), "rollouts": ("token_ids", "logp", "reward")}
    for name, columns in known.items():
        cpu, mps = (read_records(tmp_path / device / f"{name}.jsonl") for device in ("cpu", "mps"))
        for a, b in zip(cpu, mps, strict=True):
            for column in columns:
                assert a.get(column) == pytest.approx(b.get(column), abs=apart), column


def test_the_stand_in_refuses_float64(monkeypatch) -> None:
    with Apple(monkeypatch):
        x = torch.ones(2).to("mps")
        assert x.device == MPS and (x + 1).device == MPS and x.cpu().device.type == "cpu"
        assert x.cpu().double().dtype == torch.float64
        with pytest.raises(TypeError, match="float64"):
            x.cumsum(0, dtype=torch.float64)
