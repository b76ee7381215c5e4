"""drpo inside ms-swift, whose GRPO trainer is played by a stand-in written from its documented formula."""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.cases import EVERY, Rows, direct_gradient, rows
from adapters.pages import run_page
from adapters.pretend import imported_on
from drpo.errors import InputError

# What this adapter relies on: ms-swift 4.6.0, swift/rlhf_trainers/grpo_trainer.py (GRPOTrainer, and that
# _compute_loss_and_metrics calls _get_per_token_logps_and_entropies before it reads the batch) and
# swift/rl_core/data.py (GRPOBatch).
MODULE = "swift.rlhf_trainers.grpo_trainer"
RELIED_ON = {
    "_compute_loss_and_metrics": ["self", "model", "model_inputs", "grpo_batch"],
    "_get_per_token_logps_and_entropies": ["self", "model", "model_inputs", "grpo_batch", "compute_entropy"],
    "compute_loss": ["self", "model", "inputs"],
}
N_TOKENS = 40.0


@dataclass
class GRPOBatch:
    completion_mask: Tensor
    truncated_mask: Tensor
    advantages: Tensor
    rollout_per_token_logps: Tensor | None
    old_per_token_logps: Tensor | None = None


def trainer_class() -> type:
    class GRPOTrainer:
        """`model` gives log-probabilities; the clipped surrogate by `loss_type`."""

        def __init__(self, model: Any, args: Any) -> None:
            self.model, self.args, self._metrics = model, args, {"train": defaultdict(list)}
            self.accelerator = SimpleNamespace(gather=lambda value: value.reshape(1))
            self.epsilon_low = self.epsilon_high = args.epsilon
            self.overlong_filter = args.overlong_filter

        def compute_loss(self, model: Any, inputs: Any) -> Tensor:
            return self._compute_loss_and_metrics(model, inputs["model_inputs"], inputs["grpo_batch"])[0]

        def _get_per_token_logps_and_entropies(
            self, model: Any, model_inputs: Any, grpo_batch: Any, compute_entropy: bool = False
        ) -> tuple[Tensor, None]:
            return model(), None

        def _compute_loss_and_metrics(self, model: Any, model_inputs: Any, grpo_batch: Any) -> tuple[Tensor, Any]:
            logp, _ = self._get_per_token_logps_and_entropies(model, model_inputs, grpo_batch, compute_entropy=True)
            mask = grpo_batch.completion_mask
            if self.overlong_filter:
                mask = mask & ~grpo_batch.truncated_mask.unsqueeze(-1)
            old = logp.detach() if grpo_batch.old_per_token_logps is None else grpo_batch.old_per_token_logps
            ratio = (logp - old).exp()
            clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
            loss = -torch.minimum(ratio * grpo_batch.advantages, clipped * grpo_batch.advantages)
            if self.args.loss_type == "dapo":
                return (loss * mask).sum() / N_TOKENS, {}
            return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean(), {}

    return GRPOTrainer


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "4.6.0")
    with imported_on("drpo.adapters.swift", {MODULE: {"GRPOTrainer": trainer_class()}}) as module:
        yield module


def arguments(**changed: Any) -> SimpleNamespace:
    usual = {
        "epsilon": 0.2, "epsilon_high": None, "delta": None, "importance_sampling_level": "token", "top_p": 1.0,
        "top_k": -1, "repetition_penalty": 1.0, "loss_type": "dapo", "use_liger_kernel": False, "use_vllm": True,
        "rollout_importance_sampling_mode": None, "off_policy_sequence_mask_delta": None, "overlong_filter": False,
    }  # fmt: skip
    return SimpleNamespace(**usual | changed)


def of_rows(batch: Rows, **changed: Any) -> GRPOBatch:
    usual = {
        "completion_mask": batch.keep,
        "truncated_mask": torch.zeros(len(batch.keep), dtype=torch.bool),
        "advantages": batch.advantage.unsqueeze(1).expand(batch.logp.shape),
        "rollout_per_token_logps": batch.behavior_logp,
    }
    return GRPOBatch(**usual | changed)


def trained(kind: type, batch: Rows, inside: GRPOBatch, **changed: Any) -> tuple[Any, Tensor]:
    logp = batch.logp.clone().requires_grad_()
    model = torch.nn.Module()
    model.forward = lambda: logp  # type: ignore[assignment]
    trainer = kind(model, arguments(**changed))
    loss = trainer.compute_loss(model, {"model_inputs": {}, "grpo_batch": inside})
    (slope,) = torch.autograd.grad(loss, logp)
    return trainer, slope


def token_weights(kind: str, keep: Tensor) -> Tensor:
    one = torch.tensor(1 / N_TOKENS) if kind == "dapo" else 1 / (len(keep) * keep.sum(1, keepdim=True).clamp(min=1))
    return one.expand(keep.shape)


@pytest.mark.parametrize("kind", ["dapo", "grpo"])
@pytest.mark.parametrize("spec", [*EVERY, "gspo(0.1, 0.1)"])
def test_the_trainers_loss_has_the_objectives_gradient(adapter: ModuleType, spec: str, kind: str):
    trainer = trainer_class()
    adapter.install(spec, trainer)
    for seed in range(3):
        batch = rows(seed)
        inside = of_rows(batch)
        _, slope = trained(trainer, batch, inside, loss_type=kind)
        assert inside.old_per_token_logps is None and inside.advantages.equal(of_rows(batch).advantages)  # used again
        wanted = direct_gradient(spec, batch, token_weights(kind, batch.keep))
        if "gspo" not in spec or kind == "grpo":
            assert (slope.double() - wanted).abs().max() < 1e-6


def test_the_comparison_would_see_the_frameworks_own_loss():
    batch = rows(1)
    _, slope = trained(trainer_class(), batch, of_rows(batch))
    wanted = direct_gradient("drpo(0.2)", batch, token_weights("dapo", batch.keep))
    assert (slope.double() - wanted).abs().max() > 1e-3


def test_the_log_says_that_the_loss_ran(adapter: ModuleType):
    trainer, batch = trainer_class(), rows(2)
    adapter.install("drpo(0.2)", trainer)
    built, _ = trained(trainer, batch, of_rows(batch))
    logged = built._metrics["train"]
    assert logged["drpo/loss_tokens/drpo_0.2"] == [batch.keep.sum().item()]
    assert math.isfinite(logged["drpo/weight_min"][0]) and logged["drpo/unscored"] == [0.0]


def test_truncated_completions_that_ms_swift_leaves_out_are_not_counted(adapter: ModuleType):
    trainer, batch = trainer_class(), rows(0)
    adapter.install("drpo(0.2)", trainer)
    cut = torch.tensor([True, False, False, False])
    built, slope = trained(trainer, batch, of_rows(batch, truncated_mask=cut), overlong_filter=True)
    assert built._metrics["train"]["drpo/loss_tokens/drpo_0.2"] == [batch.keep[1:].sum().item()]
    assert (slope[0] == 0).all() and slope[1].abs().max() > 0


def test_a_trainer_that_computes_its_loss_elsewhere_stops(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """The planted bypass: as its fused Liger loss does."""
    trainer = trainer_class()
    monkeypatch.setattr(trainer, "compute_loss", lambda self, model, inputs: model().mean())
    adapter.install("drpo(0.2)", trainer)
    with pytest.raises(InputError, match=r"_compute_loss_and_metrics: the loss of drpo_0\.2 did not run in this step"):
        trained(trainer, rows(0), of_rows(rows(0)))


def test_a_batch_without_the_samplers_log_probabilities_is_refused(adapter: ModuleType):
    trainer = trainer_class()
    adapter.install("drpo(0.2)", trainer)
    with pytest.raises(InputError, match=r"^rollout_per_token_logps is missing"):
        trained(trainer, rows(0), of_rows(rows(0), rollout_per_token_logps=None))


def test_megatrons_trainer_is_refused(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(adapter.__dict__, "ELSEWHERE", ("math",))
    with pytest.raises(InputError, match=r"^math: Megatron's trainer has a loss of its own, .* use `swift rlhf`$"):
        adapter.install("drpo(0.2)", trainer_class())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"use_liger_kernel": True},
            r"^--use_liger_kernel=True: its fused loss is another; set --use_liger_kernel=False$",
        ),
        ({"rollout_importance_sampling_mode": "token_mask"}, r"^--rollout_importance_sampling_mode='token_mask': "),
        ({"off_policy_sequence_mask_delta": 0.1}, r"^--off_policy_sequence_mask_delta=0\.1: "),
        ({"use_vllm": False}, r"^--use_vllm false: .*; set --use_vllm true$"),
        ({"top_p": 0.9}, r"^--top_p=0\.9: mu would not be the distribution"),
        ({"top_k": 50}, r"^--top_k=50: mu would not be the distribution"),
        ({"repetition_penalty": 1.1}, r"^--repetition_penalty=1\.1: "),
        ({"delta": 4.0}, r"^--delta=4\.0: the trust region is the objective's"),
        ({"importance_sampling_level": "sequence_token"}, r"^--importance_sampling_level='sequence_token': "),
        ({"loss_type": "fipo"}, r"^--loss_type='fipo': .*'dapo' or 'grpo'"),
    ],
)
def test_refusals(adapter: ModuleType, changed: dict[str, Any], message: str):
    trainer = trainer_class()
    adapter.install("drpo(0.2)", trainer)
    with pytest.raises(InputError, match=message) as refused:
        trainer(torch.nn.Module(), arguments(**changed))
    assert "\n" not in str(refused.value)


def test_an_objective_must_be_written(adapter: ModuleType):
    with pytest.raises(InputError, match=r"^objective is not set"):
        adapter.install(None, trainer_class())


def test_the_page(adapter: ModuleType):
    before = adapter.GRPOTrainer.compute_loss
    run_page("swift")
    assert adapter.GRPOTrainer.compute_loss.__wrapped__ is before


def test_the_stand_in_has_what_is_relied_on():
    for name, names in RELIED_ON.items():
        assert list(inspect.signature(getattr(trainer_class(), name)).parameters)[: len(names)] == names


@pytest.mark.adapters
def test_the_framework_has_what_is_relied_on():
    released = pytest.importorskip(MODULE, reason="ms-swift is not installed")
    for name, names in RELIED_ON.items():
        assert list(inspect.signature(getattr(released.GRPOTrainer, name)).parameters)[: len(names)] == names
    source = inspect.getsource(released.GRPOTrainer._compute_loss_and_metrics)
    before, after = source.split("self._get_per_token_logps_and_entropies(")
    assert "grpo_batch.advantages" not in before and "grpo_batch.old_per_token_logps" not in before
    assert "grpo_batch.advantages" in after and "self.epsilon_high" in after
