"""drpo inside Unsloth: its loss is played by a stand-in; the tests marked `adapters` run the released function itself.

Unsloth itself does not start without a GPU. What runs of it on a CPU is the module with its loss, on tensors.
"""

import inspect
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.cases import OF_2026, SPECS, Rows, direct_gradient, rows
from adapters.parity import record as found
from adapters.pretend import imported_on
from drpo.adapters.record import LossRecord
from drpo.adapters.weighing import objective_of
from drpo.errors import InputError

# What this adapter relies on: unsloth and unsloth_zoo 2026.10.9, unsloth_zoo/rl_replacements.py (grpo_compute_loss,
# UnslothEfficientGRPO, grpo_accumulated_loss) and unsloth/models/rl_replacements.py (compute_loss, which reads
# "unsloth_rollout_logps_as_old" of the batch).
EFFICIENT, SLOW = "UnslothEfficientGRPO", "grpo_compute_loss_slow"
POSITIONS = ["ref", "new", "old", "sampling_per_token_logps", "input_ids", "mask", "beta", "advantages"]
AS_OLD = "UNSLOTH_GRPO_ROLLOUT_LOGPROBS_AS_OLD"
N_TOKENS, N_LONGEST = 40.0, 11
GIVEN = {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": 3.0, "rollout_logps_as_old": True}
"""What Unsloth passes beside, where old is mu."""


def grpo_compute_loss_slow(
    ref: Any, new: Tensor, old: Tensor, sampling_per_token_logps: Any, input_ids: Any, mask: Tensor, beta: float,
    advantages: Tensor, **settings: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """A clipped surrogate with a dual clip, and a bound on the log-ratio where old is mu; the documented reductions."""
    keep = mask.bool()
    log_ratio = torch.where(keep, new, 0) - torch.where(keep, old, 0)
    if settings["rollout_logps_as_old"]:
        log_ratio = log_ratio.clamp(-20, 20)
    ratio, advantages = log_ratio.exp(), advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    clipped = ratio.clamp(1 - settings["epsilon_low"], 1 + settings["epsilon_high"])
    outer = ratio if settings["delta"] is None else ratio.clamp(max=settings["delta"])
    loss = -torch.minimum(outer * advantages, clipped * advantages)
    if beta:
        off = torch.where(keep, ref - new, 0)
        loss = loss + beta * (off.exp() - off - 1)
    total = (loss * mask).sum()
    value = {
        "dapo": total / settings["num_items_in_batch"],
        "bnpo": total / mask.sum(),
        "dr_grpo": total / (len(mask) * settings["max_completion_length"]),
        "grpo": ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean(),
    }[settings["loss_type"]]
    return value, mask.sum(1).float().mean(), torch.zeros(()), None, None, ratio, mask


class UnslothEfficientGRPO:
    @staticmethod
    def apply(
        new: Tensor, old: Any, ref: Any, sampling: Any, head: Any, ids: Any, mask: Any, advantages: Any, beta: float,
        scaler: Any = None, n_chunks: int = 1, settings: Any = None, upstream_scale: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        return grpo_compute_loss_slow(ref, new, old, sampling, ids, mask, beta, advantages, **settings)[:-1]


class UnslothGRPOTrainer:
    """As much of Unsloth's trainer as an adapter meets; `model` gives log-probabilities."""

    def __init__(self, model: Any, args: Any) -> None:
        self.model, self.args, self._metrics = model, args, {"train": defaultdict(list)}
        self.accelerator = SimpleNamespace(gather=lambda value: value.reshape(1))

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Tensor:
        settings = GIVEN | sizes(self.args.loss_type)
        apply = getattr(sys.modules["UnslothGRPOTrainer"], EFFICIENT).apply
        mask = inputs["completion_mask"]
        loss, *_ = apply(
            model(), inputs["sampling_per_token_logps"], None, None, None, None, mask, inputs["advantages"], 0.0, None,
            1, settings, None,
        )  # fmt: skip
        return loss


UnslothGRPOTrainer.__module__ = "UnslothGRPOTrainer"


@pytest.fixture(scope="module")
def adapter() -> Iterator[ModuleType]:
    """The adapter after an `import unsloth`."""
    written = {"UnslothGRPOTrainer": UnslothGRPOTrainer, EFFICIENT: UnslothEfficientGRPO, SLOW: grpo_compute_loss_slow}
    modules = {"trl": {"GRPOTrainer": UnslothGRPOTrainer}, "UnslothGRPOTrainer": written}
    with imported_on("drpo.adapters.unsloth", modules) as module:
        yield module


@pytest.fixture(params=["stand-in", pytest.param("released", marks=pytest.mark.adapters)])
def framework(request: pytest.FixtureRequest) -> ModuleType:
    """A module as Unsloth writes it, with the released functions where unsloth_zoo is installed."""
    module = ModuleType("UnslothGRPOTrainer")
    if request.param == "stand-in":
        vars(module).update({EFFICIENT: UnslothEfficientGRPO, SLOW: grpo_compute_loss_slow})
        return module
    os.environ |= {"UNSLOTH_ZOO_DISABLE_GPU_INIT": "1", "UNSLOTH_IS_PRESENT": "1", "UNSLOTH_COMPILE_DISABLE": "1"}
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(request.getfixturevalue("tmp_path_factory").mktemp("unsloth"))
    zoo = pytest.importorskip("unsloth_zoo.rl_replacements", reason="`make test-trl` installs unsloth_zoo")
    vars(module).update({EFFICIENT: zoo.UnslothEfficientGRPO, SLOW: zoo.grpo_compute_loss})
    return module


def config(**changed: Any) -> SimpleNamespace:
    usual = {
        "epsilon": 0.2, "epsilon_high": None, "delta": None, "off_policy_mask_threshold": None,
        "importance_sampling_level": "token", "vllm_importance_sampling_correction": True, "top_p": 1.0, "top_k": None,
        "min_p": None, "repetition_penalty": 1.0, "loss_type": "dapo", "vllm_sampling_params": None,
    }  # fmt: skip
    return SimpleNamespace(**usual | changed)


Computed = Callable[[ModuleType, Tensor, Rows, str, float], Tensor]


def by_efficient(module: ModuleType, logp: Tensor, batch: Rows, kind: str, beta: float) -> Tensor:
    settings = GIVEN | sizes(kind)
    head, ids = torch.zeros(1), torch.zeros(batch.keep.shape, dtype=torch.long)
    columns = (logp, batch.behavior_logp, batch.logp - 0.2, None, head, ids, batch.keep.long(), batch.advantage)
    return getattr(module, EFFICIENT).apply(*columns, beta, None, 1, settings, None)[0]


def by_slow(module: ModuleType, logp: Tensor, batch: Rows, kind: str, beta: float) -> Tensor:
    ids = torch.zeros(batch.keep.shape, dtype=torch.long)
    columns = (batch.logp - 0.2, logp, batch.behavior_logp, None, ids, batch.keep.long(), beta, batch.advantage)
    return getattr(module, SLOW)(*columns, **GIVEN | sizes(kind))[0]


def sizes(kind: str) -> dict[str, Any]:
    return {"loss_type": kind, "num_items_in_batch": N_TOKENS, "max_completion_length": N_LONGEST}


def token_weights(kind: str, keep: Tensor) -> Tensor:
    """What each token counts, by the names of the aggregations."""
    keep = keep.double()
    return {
        "dapo": torch.full_like(keep, 1 / N_TOKENS),
        "bnpo": torch.full_like(keep, 1 / keep.sum().item()),
        "dr_grpo": torch.full_like(keep, 1 / (len(keep) * N_LONGEST)),
        "grpo": (1 / (len(keep) * keep.sum(1, keepdim=True))).expand_as(keep),
    }[kind]


KINDS = ("dapo", "grpo", "bnpo", "dr_grpo")
# A sequence's objective is exact where all of its tokens count equally.
PAIRS = [
    *((spec, kind) for spec in SPECS for kind in KINDS),
    *(pytest.param(spec, kind, marks=pytest.mark.slow) for spec in OF_2026 for kind in KINDS),
    ("cppo(0.2)", "dapo"),
    ("gspo(0.1, 0.1)", "grpo"),
]


@pytest.mark.parametrize(("spec", "kind"), PAIRS)
@pytest.mark.parametrize("computed", [by_efficient, by_slow])
def test_unsloths_loss_has_the_objectives_gradient(
    adapter: ModuleType, framework: ModuleType, computed: Computed, spec: str, kind: str
):
    worst = 0.0
    for seed in range(3):
        batch, made = rows(seed), LossRecord(objective_of(spec, "objective"))
        logp = batch.logp.clone().requires_grad_()
        with adapter.weighed(framework, made):
            loss = computed(framework, logp, batch, kind, 0.0)
        (slope,) = torch.autograd.grad(loss, logp)
        wanted = direct_gradient(spec, batch, token_weights(kind, batch.keep))
        worst = max(worst, ((slope.double() - wanted).abs().max() / max(1.0, wanted.abs().max())).item())
        assert next(iter(made.take("Unsloth").items()))  # ran
    assert worst < 1e-6
    if "unsloth_zoo" in getattr(framework, EFFICIENT).__module__:
        name = getattr(computed, "__name__", "").removeprefix("by_")
        found(f"Unsloth's {name} loss, loss_type={kind}", sys.modules["unsloth_zoo"].__version__, spec, worst)


def test_the_surrogate_that_unsloth_computes_otherwise_is_another(adapter: ModuleType, framework: ModuleType):
    """The comparison itself: without the adapter the gradient is the clipped one."""
    batch = rows(1)
    logp = batch.logp.clone().requires_grad_()
    (slope,) = torch.autograd.grad(by_efficient(framework, logp, batch, "dapo", 0.0), logp)
    wanted = direct_gradient("drpo(0.2)", batch, token_weights("dapo", batch.keep))
    assert (slope.double() - wanted).abs().max() > 1e-3


def test_the_reference_penalty_stays_unsloths(adapter: ModuleType, framework: ModuleType):
    batch, made = rows(0), LossRecord(objective_of("drpo(0.2)", "objective"))
    slopes = []
    for beta in (0.0, 0.5):
        logp = batch.logp.clone().requires_grad_()
        with adapter.weighed(framework, made):
            (slope,) = torch.autograd.grad(by_slow(framework, logp, batch, "dapo", beta), logp)
        slopes.append(slope)
    off = torch.full_like(batch.logp, -0.2)  # of the reference from the policy
    wanted = 0.5 * (1 - off.exp()) * batch.keep / N_TOKENS
    assert torch.allclose(slopes[1] - slopes[0], wanted, atol=1e-6)


def test_unsloths_module_is_as_it_was_afterwards(adapter: ModuleType, framework: ModuleType):
    before = dict(vars(framework))
    with pytest.raises(ZeroDivisionError), adapter.weighed(framework, LossRecord(objective_of("none", "objective"))):
        assert vars(framework) != before
        raise ZeroDivisionError
    assert vars(framework) == before


def trained(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch, batch: Rows, **changed: Any) -> tuple[Any, Tensor]:
    monkeypatch.setenv(AS_OLD, "1")
    logp = batch.logp.clone().requires_grad_()
    model = torch.nn.Module()
    model.forward = lambda: logp  # type: ignore[assignment]
    trainer = adapter.DRPOTrainer(model, config(), objective="drpo(0.2)")
    inputs = {
        "completion_mask": batch.keep.long(),
        "sampling_per_token_logps": batch.behavior_logp,
        "advantages": batch.advantage,
        "unsloth_rollout_logps_as_old": torch.ones(len(batch.keep)),
    }
    trainer.compute_loss(model, inputs | changed).backward()
    assert logp.grad is not None
    return trainer, logp.grad


def test_the_trainer_trains_the_objective_and_logs_that_it_did(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    batch = rows(2)
    trainer, slope = trained(adapter, monkeypatch, batch)
    wanted = direct_gradient("drpo(0.2)", batch, token_weights("dapo", batch.keep))
    assert (slope.double() - wanted).abs().max() < 1e-6
    logged = trainer._metrics["train"]
    assert logged["drpo/loss_tokens/drpo_0.2"] == [batch.keep.sum().item()]
    assert logged["drpo/prob_diff_max"][0] > 0.1 and math.isfinite(logged["drpo/weight_min"][0])
    assert getattr(sys.modules["UnslothGRPOTrainer"], EFFICIENT) is UnslothEfficientGRPO


def test_a_trainer_that_computes_its_loss_elsewhere_stops(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """The planted bypass: a version of Unsloth that inlines its loss."""
    monkeypatch.setattr(UnslothGRPOTrainer, "compute_loss", lambda self, model, inputs: model().mean())
    with pytest.raises(
        InputError, match=f"called neither {EFFICIENT} nor {SLOW}: the loss of drpo_0.2 did not run in this step"
    ):
        trained(adapter, monkeypatch, rows(0))


def test_a_batch_whose_old_is_the_trainers_is_refused(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=rf"^{AS_OLD}=1 was not applied to this batch .*set use_vllm=True"):
        trained(adapter, monkeypatch, rows(0), unsloth_rollout_logps_as_old=None)


@pytest.mark.parametrize(
    ("changed", "environment", "message"),
    [
        ({}, {AS_OLD: "0"}, rf"^{AS_OLD}=0: .*; set {AS_OLD}=1"),
        ({}, {AS_OLD: "1", "UNSLOTH_GRPO_ROLLOUT_RS": "token_k3"}, r"^UNSLOTH_GRPO_ROLLOUT_RS=token_k3 .* unset it"),
        ({"top_p": 0.9}, {AS_OLD: "1"}, r"^top_p=0\.9: mu would not be .*; set top_p=1\.0"),
        ({"top_k": 20}, {AS_OLD: "1"}, "set top_k=0"),
        ({"min_p": 0.1}, {AS_OLD: "1"}, "set min_p=None"),
        ({"repetition_penalty": 1.1}, {AS_OLD: "1"}, r"set repetition_penalty=1\.0"),
        ({"vllm_sampling_params": SimpleNamespace(top_p=0.95)}, {AS_OLD: "1"}, r"^vllm_sampling_params\.top_p=0\.95: "),
        ({"vllm_sampling_params": SimpleNamespace(min_p=0.1)}, {AS_OLD: "1"}, r"^vllm_sampling_params\.min_p=0\.1: "),
        ({"delta": 4.0}, {AS_OLD: "1"}, "set delta=None"),
        ({"off_policy_mask_threshold": 0.1}, {AS_OLD: "1"}, "set off_policy_mask_threshold=None"),
        ({"importance_sampling_level": "sequence"}, {AS_OLD: "1"}, "set importance_sampling_level='token'"),
        ({"loss_type": "sapo"}, {AS_OLD: "1"}, "loss_type='sapo': .*'dapo' or 'grpo'"),
    ],
)
def test_refusals(adapter: ModuleType, changed: dict[str, Any], environment: dict[str, str], message: str):
    adapter.check(config(), {AS_OLD: "1"})
    with pytest.raises(InputError, match=message) as refused:
        adapter.check(config(**changed), environment)
    assert "\n" not in str(refused.value)


def test_an_objective_must_be_written(adapter: ModuleType):
    with pytest.raises(InputError, match=r"^objective is not set"):
        adapter.DRPOTrainer(torch.nn.Module(), config())


def test_trls_own_trainer_is_refused(adapter: ModuleType):
    own = type("GRPOTrainer", (), {"__module__": "trl.trainer.grpo_trainer"})
    with pytest.raises(InputError, match=r"^trl\.GRPOTrainer is GRPOTrainer, not Unsloth's .*: import unsloth before"):
        adapter.module_of(own)


@pytest.mark.adapters
def test_the_framework_has_what_is_relied_on(framework: ModuleType):
    assert list(inspect.signature(getattr(framework, SLOW)).parameters)[:8] == POSITIONS
