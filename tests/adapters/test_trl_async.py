"""TRL's asynchronous trainer with an objective: its own compute_loss, on a flat batch of rows; no vLLM, no training."""

import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.adapters
trl = pytest.importorskip("trl")
pytest.importorskip("trl.experimental.async_grpo", reason="this TRL has no asynchronous trainer")

from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer  # noqa: E402

from adapters.cases import OF_2026, SEQUENCE, SPECS, Rows, direct_gradient, rows  # noqa: E402
from adapters.parity import record  # noqa: E402
from drpo.adapters.record import LossRecord  # noqa: E402
from drpo.adapters.trl_async import AsyncDRPOConfig, AsyncDRPOTrainer  # noqa: E402
from drpo.adapters.weighing import objective_of  # noqa: E402
from drpo.errors import InputError  # noqa: E402

N_TOKENS = 40.0


def bare(kind: type, spec: str = "drpo(0.2)", epsilon: float = 1.0, epsilon_high: float = math.inf) -> Any:
    """As much of a trainer as its compute_loss reads."""
    made = object.__new__(kind)
    made.accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda values, reduction: values, gather=lambda value: value.reshape(-1)
    )
    made.epsilon_low, made.epsilon_high, made.aux_loss_enabled = epsilon, epsilon_high, False
    made.current_gradient_accumulation_steps, made._metrics = 1, {"train": defaultdict(list)}
    made._step_forward_tokens = made._step_trained_tokens = made._step_seq_len_weighted = made._step_samples = 0.0
    made._step_forward_s = made._last_forward_time_s = 0.0
    made.model = SimpleNamespace(training=True)
    made._record = LossRecord(objective_of(spec, "objective"))
    return made


def flat(batch: Rows) -> dict[str, Tensor]:
    """One packed row of all completions; only kept tokens have an index, as in TRL's collator."""
    n_rows, length = batch.keep.shape
    kept = batch.keep.reshape(-1)
    places = torch.arange(n_rows * length)
    whole = torch.ones(1, n_rows * length, dtype=torch.long)
    columns = {
        "token_index": places[kept],
        "old_log_probs": batch.behavior_logp.reshape(-1)[kept],
        "advantages": batch.advantage.unsqueeze(1).expand(n_rows, length).reshape(-1)[kept],
        "segment_id": torch.arange(n_rows).unsqueeze(1).expand(n_rows, length).reshape(-1)[kept],
    }
    ends = {"tree_kv_index": -whole, "tree_cu_seqlens_q": -whole, "tree_cu_seqlens_k": -whole}
    return {
        "attention_mask": whole, "input_ids": whole, "position_ids": whole, "shift_labels": whole, **ends,
        "tree_max_seqlens": torch.tensor([[length, length]]), "global_n_tokens": torch.tensor([N_TOKENS]),
        "global_n_forward_tokens": torch.tensor([N_TOKENS]), "mean_seq_len": torch.tensor([10.0]),
        **{name: values.unsqueeze(0) for name, values in columns.items()},
    }  # fmt: skip


def slope_of(trainer: Any, batch: Rows) -> Tensor:
    leaf = batch.logp.clone().requires_grad_()
    outputs = SimpleNamespace(log_probs=leaf.reshape(1, -1), entropy=torch.zeros(1, leaf.numel()))
    inputs = flat(batch)
    before = {name: values.clone() for name, values in inputs.items()}
    loss = trainer.compute_loss(lambda **_: outputs, inputs)
    assert all(torch.equal(before[name], values) or values.isnan().any() for name, values in inputs.items())
    (slope,) = torch.autograd.grad(loss, leaf)
    return slope


@pytest.mark.parametrize("spec", [*SPECS, *OF_2026, SEQUENCE])
def test_its_own_compute_loss_has_the_objectives_gradient(spec: str):
    worst = 0.0
    for seed in range(3):
        batch = rows(seed)
        wanted = direct_gradient(spec, batch, torch.full_like(batch.logp, 1 / N_TOKENS))
        worst = max(worst, (slope_of(bare(AsyncDRPOTrainer, spec), batch).double() - wanted).abs().max().item())
    record("TRL, AsyncGRPOTrainer", trl.__version__, spec, worst)
    assert worst < 1e-6


def test_the_comparison_would_see_trls_own_loss():
    wanted = direct_gradient("drpo(0.2)", rows(1), torch.full_like(rows(1).logp, 1 / N_TOKENS))
    assert (slope_of(bare(AsyncGRPOTrainer, epsilon=0.2, epsilon_high=0.2), rows(1)) - wanted).abs().max() > 1e-3


def test_the_log_says_that_the_loss_ran_and_an_unscored_token_is_on_policy():
    trainer, batch = bare(AsyncDRPOTrainer), rows(2)
    batch.behavior_logp[0, 0] = float("nan")
    slope = slope_of(trainer, batch)
    assert slope.isfinite().all() and slope[0, 0] == pytest.approx(-batch.advantage[0].item() / N_TOKENS)
    assert trainer._metrics["train"]["drpo/loss_tokens/drpo_0.2"] == [batch.keep.sum().item()]
    assert trainer._metrics["train"]["drpo/unscored"][0] > 0


def test_a_loss_that_reads_its_batch_in_another_way_stops(monkeypatch: pytest.MonkeyPatch):
    """The planted bypass: a compute_loss that calls the model before it reads the advantages."""
    monkeypatch.setattr(AsyncGRPOTrainer, "compute_loss", lambda self, model, inputs: model().log_probs.sum())
    with pytest.raises(
        InputError, match=r"^compute_loss of this AsyncGRPOTrainer .*: the loss of drpo_0\.2 did not run"
    ):
        slope_of(bare(AsyncDRPOTrainer), rows(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": None}, r"^objective is not set"),
        ({"epsilon": 0.2}, r"^epsilon=0\.2: .*; set epsilon=1\.0$"),
        ({"epsilon_high": 0.28}, r"^epsilon_high=0\.28: .*; set epsilon_high=inf$"),
        ({"temperature": 0.7}, r"^temperature=0\.7: a vLLM server reports .*; set temperature=1\.0$"),
        ({"top_p": 0.9}, r"^top_p=0\.9: "),
        ({"top_k": 20}, r"^top_k=20: "),
        ({"min_p": 0.1}, r"^min_p=0\.1: "),
        ({"repetition_penalty": 1.1}, r"^repetition_penalty=1\.1: "),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str):
    usual = {"output_dir": str(tmp_path), "objective": "drpo(0.2)", "use_cpu": True, "bf16": False}
    assert AsyncDRPOConfig(**usual).epsilon_high == math.inf
    with pytest.raises(InputError, match=message) as refused:
        AsyncDRPOConfig(**usual | changes)
    assert "\n" not in str(refused.value)


def test_a_configuration_without_an_objective_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args = AsyncGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    monkeypatch.setattr(AsyncGRPOTrainer, "__init__", lambda self, args: setattr(self, "args", args))
    with pytest.raises(InputError, match=r"^args: AsyncDRPOTrainer needs an AsyncDRPOConfig"):
        AsyncDRPOTrainer(args=args)
