"""drpo inside ROLL, whose worker is played by a stand-in written from its documented formula."""

import inspect
import math
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.cases import EVERY, Rows, direct_gradient, rows
from adapters.pretend import imported_on
from drpo.errors import InputError

# What this adapter relies on: alibaba/ROLL as of commit 8eb27cc2dc34c4d1, roll/pipeline/rlvr/actor_worker.py
# (ActorWorker.loss_func reads the advantages once, then asks get_old_log_probs_with_cache) and base_worker.py.
MODULE = "roll.pipeline.rlvr.actor_worker"
RELIED_ON = {
    "loss_func": ["self", "data", "output_tensor"],
    "get_old_log_probs_with_cache": ["self", "data", "log_probs"],
}
N_TOKENS = 40.0


class ActorWorker:
    """`output_tensor` is the log-probabilities; the clipped surrogate over `final_response_mask`."""

    def __init__(self, config: Any) -> None:
        self.pipeline_config = config

    def get_old_log_probs_with_cache(self, data: Any, log_probs: Tensor) -> Tensor:
        return log_probs.detach()

    def loss_func(self, data: Any, output_tensor: Tensor) -> tuple[Tensor, dict[str, float]]:
        advantages, mask = data.batch["advantages"], data.batch["final_response_mask"]
        config = self.pipeline_config
        low = config.pg_clip_low if config.use_pg_clip_range else config.pg_clip
        high = config.pg_clip_high if config.use_pg_clip_range else config.pg_clip
        ratio = (output_tensor - self.get_old_log_probs_with_cache(data, output_tensor)).exp()
        loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        return (loss * mask).sum() / N_TOKENS, {"actor/pg_loss@sum": loss.mean().item()}


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setenv("DRPO_OBJECTIVE", "drpo(0.2)")
    with imported_on("drpo.adapters.roll", {MODULE: {"ActorWorker": ActorWorker}}) as module:
        yield module


def configured(**changed: Any) -> SimpleNamespace:
    sampling = {name: changed.pop(name) for name in ("top_p", "top_k", "repetition_penalty") if name in changed}
    weighted, filters = changed.pop("is_weight", False), changed.pop("filters", [])
    usual = {
        "enable_old_logprobs_recompute": False, "dual_clip_loss": False, "importance_sampling": "token", "pg_clip": 0.2,
        "use_pg_clip_range": False, "pg_clip_low": 0.2, "pg_clip_high": 0.2,
        "train_infer_correction": SimpleNamespace(is_weight=SimpleNamespace(enabled=weighted), filters=filters),
        "actor_infer": SimpleNamespace(generating_args=SimpleNamespace(**{"top_p": 1.0, "top_k": -1} | sampling)),
    }  # fmt: skip
    return SimpleNamespace(**usual | changed)


def of_rows(batch: Rows) -> SimpleNamespace:
    """ROLL's masks and log-probabilities are of tokens 1 on; `response_mask` is of all."""
    whole = torch.cat((torch.zeros(len(batch.keep), 1, dtype=torch.long), batch.keep.long()), 1)
    columns = {
        "advantages": batch.advantage.unsqueeze(1).expand(batch.logp.shape).clone(),
        "infer_logprobs": batch.behavior_logp,
        "response_mask": whole,
        "final_response_mask": batch.keep.long(),
    }
    return SimpleNamespace(batch=columns)


def trained(kind: type, batch: Rows, data: Any, **changed: Any) -> tuple[Tensor, dict[str, float]]:
    leaf = batch.logp.clone().requires_grad_()
    loss, metrics = kind(configured(**changed)).loss_func(data, leaf)
    (slope,) = torch.autograd.grad(loss, leaf)
    return slope, metrics


@pytest.mark.parametrize("spec", EVERY)
def test_the_workers_loss_has_the_objectives_gradient(adapter: ModuleType, spec: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DRPO_OBJECTIVE", spec)
    for seed in range(3):
        batch = rows(seed)
        data = of_rows(batch)
        slope, _ = trained(adapter.ActorWorker, batch, data)
        wanted = direct_gradient(spec, batch, torch.full_like(batch.logp, 1 / N_TOKENS))
        assert (slope.double() - wanted).abs().max() < 1e-6
        assert data.batch["advantages"].equal(of_rows(batch).batch["advantages"])  # ROLL trains on it again


def test_the_comparison_would_see_the_frameworks_own_loss():
    batch = rows(1)
    slope, _ = trained(ActorWorker, batch, of_rows(batch))
    wanted = direct_gradient("drpo(0.2)", batch, torch.full_like(batch.logp, 1 / N_TOKENS))
    assert (slope.double() - wanted).abs().max() > 1e-3


def test_the_metrics_say_that_the_loss_ran_and_the_configuration_is_as_before(adapter: ModuleType):
    batch = rows(2)
    worker = adapter.ActorWorker(configured())
    _, metrics = worker.loss_func(of_rows(batch), batch.logp.clone().requires_grad_())
    assert metrics["drpo/loss_tokens/drpo_0.2@sum"] == batch.keep.sum() and "actor/pg_loss@sum" in metrics
    assert math.isfinite(metrics["drpo/weight_min@mean"]) and worker.pipeline_config == configured()


def test_a_loss_that_bypasses_the_objective_stops(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """The planted bypass: a pipeline whose loss reads old log-probabilities from its batch."""
    monkeypatch.setattr(ActorWorker, "loss_func", lambda self, data, output_tensor: (output_tensor.mean(), {}))
    with pytest.raises(
        InputError, match=r"did not ask get_old_log_probs_with_cache: the loss of drpo_0\.2 did not run in this step"
    ):
        trained(adapter.ActorWorker, rows(0), of_rows(rows(0)))


@pytest.mark.parametrize("missing", [None, torch.zeros(0, 4)])
def test_a_batch_without_the_samplers_log_probabilities_is_refused(adapter: ModuleType, missing: Any):
    data = of_rows(rows(0))
    data.batch["infer_logprobs"] = missing
    with pytest.raises(InputError, match=r"^infer_logprobs is missing, and ROLL would take the trainer's own"):
        trained(adapter.ActorWorker, rows(0), data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"enable_old_logprobs_recompute": True}, r"^enable_old_logprobs_recompute=True: "),
        ({"is_weight": True}, r"^train_infer_correction multiplies .*is_weight\.enabled=false and filters=\[\]$"),
        ({"filters": ["one"]}, r"^train_infer_correction multiplies"),
        ({"dual_clip_loss": True}, r"^dual_clip_loss=True: .*; set dual_clip_loss=False$"),
        ({"importance_sampling": "seq"}, r"^importance_sampling='seq': "),
        ({"top_p": 0.9}, r"^actor_infer\.generating_args\.top_p=0\.9: "),
        ({"top_k": 20}, r"^actor_infer\.generating_args\.top_k=20: "),
        ({"repetition_penalty": 1.1}, r"^actor_infer\.generating_args\.repetition_penalty=1\.1: "),
    ],
)
def test_refusals(adapter: ModuleType, changed: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as refused:
        trained(adapter.ActorWorker, rows(0), of_rows(rows(0)), **changed)
    assert "\n" not in str(refused.value)


def test_an_objective_must_be_written(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DRPO_OBJECTIVE")
    with pytest.raises(InputError, match=r"^actor_train\.system_envs\.DRPO_OBJECTIVE is not set"):
        trained(adapter.ActorWorker, rows(0), of_rows(rows(0)))


def test_old_log_probabilities_elsewhere_are_rolls(adapter: ModuleType):
    logp = rows(0).logp
    assert adapter.ActorWorker(configured()).get_old_log_probs_with_cache(None, logp).equal(logp)


def test_the_stand_in_has_what_is_relied_on():
    for name, names in RELIED_ON.items():
        assert list(inspect.signature(getattr(ActorWorker, name)).parameters) == names


@pytest.mark.adapters
def test_the_framework_has_what_is_relied_on():
    released = pytest.importorskip(MODULE, reason="ROLL is not installed; it is not in the package index")
    for name, names in RELIED_ON.items():
        assert list(inspect.signature(getattr(released.ActorWorker, name)).parameters) == names
    source = inspect.getsource(released.ActorWorker.loss_func)
    before, after = source.split("self.get_old_log_probs_with_cache(data, log_probs)")
    assert before.count('data.batch["advantages"]') == 1 and 'data.batch["advantages"]' not in after
