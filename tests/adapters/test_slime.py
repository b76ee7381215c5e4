"""drpo inside slime, whose policy loss is played by a stand-in written from its documented formula."""

import inspect
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.cases import EVERY, Rows, direct_gradient, rows
from adapters.pretend import imported_on
from drpo.errors import InputError

# What this adapter relies on: THUDM/slime, slime/backends/megatron_utils/loss.py as of commit 00c2d6db0f23a490
# (policy_loss_function, loss_function), slime/utils/ppo_utils.py as of 06787cf5798525d9 (compute_policy_loss) and
# slime/utils/arguments.py as of 002fa9d6bac42357 (the flags, and --custom-config-path, whose entries become args).
FRAMEWORK = "slime.backends.megatron_utils.loss"
RELIED_ON = {
    "policy_loss_function": ["args", "batch", "logits", "sum_of_sample_mean"],
    "compute_policy_loss": ["ppo_kl", "advantages", "eps_clip", "eps_clip_high", "eps_clip_c"],
}
SOURCE = ('batch["rollout_log_probs"]', 'batch["loss_masks"]', "args.use_rollout_logprobs", "old_log_probs - log_probs")


def compute_policy_loss(
    ppo_kl: Tensor, advantages: Tensor, eps_clip: float, eps_clip_high: float, eps_clip_c: float | None = None
) -> tuple[Tensor, Tensor]:
    ratio = (-ppo_kl).exp()
    clipped = ratio.clamp(1 - eps_clip, 1 + eps_clip_high)
    return torch.max(-ratio * advantages, -clipped * advantages), (ratio != clipped).float()


def policy_loss_function(
    args: Namespace, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate against the rollout's or the recomputed log-probabilities, less an entropy bonus."""
    whole = torch.log_softmax(logits[0] / args.rollout_temperature, -1)
    log_probs = whole.gather(-1, torch.cat(batch["tokens"]).unsqueeze(-1)).squeeze(-1)
    old_log_probs = torch.cat(batch["rollout_log_probs"] if args.use_rollout_logprobs else batch["log_probs"])
    per_token = sys.modules[FRAMEWORK].compute_policy_loss  # as a global name of that module
    surrogate, clipped = per_token(
        old_log_probs - log_probs, torch.cat(batch["advantages"]), 0.2, 0.2, eps_clip_c=args.eps_clip_c
    )
    entropy = sum_of_sample_mean(-(whole.exp() * whole).sum(-1))
    loss = sum_of_sample_mean(surrogate) - args.entropy_coef * entropy
    return loss, {"loss": loss.detach(), "pg_clipfrac": sum_of_sample_mean(clipped).detach()}


@pytest.fixture(scope="module")
def adapter() -> Iterator[ModuleType]:
    """The adapter, on a stand-in for slime's modules."""
    content = {"compute_policy_loss": compute_policy_loss, "policy_loss_function": policy_loss_function}
    with imported_on("drpo.adapters.slime", {FRAMEWORK: content}) as module:
        yield module


def arguments(objective: str | None = "drpo(0.2)", **changed: Any) -> Namespace:
    usual = {
        "drpo_objective": objective, "use_rollout_logprobs": True, "use_tis": False, "get_mismatch_metrics": False,
        "use_opsm": False, "eps_clip_c": None, "rollout_top_p": 1.0, "rollout_top_k": -1, "rollout_temperature": 1.0,
        "advantage_estimator": "grpo", "entropy_coef": 0.0, "context_parallel_size": 1,
    }  # fmt: skip
    return Namespace(**usual | changed)


def batch_of(batch: Rows) -> dict[str, Any]:
    """Every row a sample; each token is the first of two."""
    return {
        "tokens": list(torch.zeros_like(batch.logp, dtype=torch.long)),
        "rollout_log_probs": list(batch.behavior_logp),
        "log_probs": list(batch.logp.detach() - 0.3),
        "advantages": list(batch.advantage.unsqueeze(1).expand(batch.logp.shape)),
        "loss_masks": list(batch.keep.int()),
    }


def logits_of(batch: Rows) -> Tensor:
    """[1, T, 2] with which the first token of two has the rows' probability."""
    p = batch.logp.double().exp().reshape(1, -1)
    return torch.stack((p.log(), (1 - p).log()), -1).requires_grad_()


def reduction(batch: Rows, by_token: bool) -> Callable[[Tensor], Tensor]:
    mask = batch.keep.double()
    count = torch.ones(len(mask), 1) if by_token else mask.sum(1, keepdim=True)
    return lambda values: (values.reshape(mask.shape) * mask / count).sum()


def gradient(adapter: ModuleType, args: Namespace, batch: Rows, by_token: bool) -> Tensor:
    """d loss / d logp, [B, T], from that of the first token's logit."""
    logits = logits_of(batch)
    loss, _ = adapter.loss(args, batch_of(batch), logits, reduction(batch, by_token))
    (slope,) = torch.autograd.grad(loss, logits)
    return slope[0, :, 0].reshape(batch.logp.shape) / (1 - batch.logp.exp())


@pytest.mark.parametrize("spec", [*EVERY, "gspo(0.2, 0.3)"])
@pytest.mark.parametrize("by_token", [True, False])
def test_the_frameworks_loss_has_the_objectives_gradient(adapter: ModuleType, spec: str, by_token: bool):
    for seed in range(3):
        batch = rows(seed, dtype=torch.float64)
        one = torch.ones(1).double() / 30 if by_token else 1 / batch.keep.double().sum(1, keepdim=True)
        found = gradient(adapter, arguments(spec), batch, by_token) * (1 / 30 if by_token else 1)
        wanted = direct_gradient(spec, batch, one.expand(batch.logp.shape))
        assert (found - wanted).abs().max() < 1e-9


def test_the_value_is_the_objectives_and_the_entropy_bonus_stays(adapter: ModuleType):
    batch, by_mean = rows(1), reduction(rows(1), False)
    plain, _ = adapter.loss(arguments("none"), batch_of(batch), logits_of(batch), by_mean)
    ratio = (batch.logp - batch.behavior_logp).exp()
    assert plain.item() == pytest.approx(by_mean(-ratio * batch.advantage.unsqueeze(1)).item(), rel=1e-4)
    with_bonus, _ = adapter.loss(arguments("none", entropy_coef=0.5), batch_of(batch), logits_of(batch), by_mean)
    p = batch.logp.exp()
    entropy = by_mean(-(p * p.log() + (1 - p) * (1 - p).log()))
    assert (plain - with_bonus).item() == pytest.approx(0.5 * entropy.item(), rel=1e-4)


def test_figures_are_reduced_by_slime(adapter: ModuleType):
    batch, by_mean = rows(2), reduction(rows(2), False)
    _, metrics = adapter.loss(arguments(), batch_of(batch), logits_of(batch), by_mean)
    moved = (batch.logp.exp() - batch.behavior_logp.exp()).abs()
    assert metrics["drpo/prob_diff_mean"].item() == pytest.approx(by_mean(moved).item(), rel=1e-4)
    assert metrics["drpo/out_of_region"].item() == pytest.approx(by_mean((moved > 0.2).float()).item())
    assert metrics["drpo/loss_tokens/drpo_0.2"] == batch.keep.sum()
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values()) and "loss" in metrics


def test_slime_is_as_it_was_afterwards(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    framework, batch = sys.modules[FRAMEWORK], rows(0)
    adapter.loss(arguments(), batch_of(batch), logits_of(batch), reduction(batch, True))
    assert framework.compute_policy_loss is compute_policy_loss
    monkeypatch.setattr(framework, "policy_loss_function", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter.loss(arguments(), batch_of(batch), logits_of(batch), reduction(batch, True))
    assert framework.compute_policy_loss is compute_policy_loss


def test_a_policy_loss_that_goes_another_way_is_noticed(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[FRAMEWORK], "policy_loss_function", lambda *_: (torch.zeros(()), {}))
    batch = rows(0)
    with pytest.raises(InputError, match="did not call compute_policy_loss, so the objective was not used"):
        adapter.loss(arguments(), batch_of(batch), logits_of(batch), reduction(batch, True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objective": None}, r"^drpo_objective is not set"),
        ({"use_rollout_logprobs": False}, r"^--use-rollout-logprobs is not given"),
        ({"use_tis": True}, r"^use_tis=True: leave out --use-tis"),
        ({"get_mismatch_metrics": True}, r"leave out --get-mismatch-metrics"),
        ({"use_opsm": True}, r"leave out --use-opsm"),
        ({"use_score_centering": True}, r"leave out --use-score-centering"),
        ({"eps_clip_c": 3.0}, r"leave out --eps-clip-c"),
        ({"rollout_top_p": 0.9}, r"--rollout-top-p must be 1"),
        ({"rollout_top_k": 50}, r"--rollout-top-k must be -1"),
        ({"advantage_estimator": "gspo"}, r"^--advantage-estimator gspo has a policy loss of its own"),
        ({"advantage_estimator": "cispo"}, r"^--advantage-estimator cispo has a policy loss of its own"),
        ({"objective": "gspo(0.2, 0.3)", "context_parallel_size": 2}, r"^--context-parallel-size 2: must be 1"),
    ],
)  # fmt: skip
def test_refusals(adapter: ModuleType, changed: dict[str, Any], message: str):
    batch = rows(0)
    with pytest.raises(InputError, match=message) as refused:
        adapter.loss(arguments(**changed), batch_of(batch), logits_of(batch), reduction(batch, True))
    assert "\n" not in str(refused.value)


def test_the_samplers_log_probabilities_are_needed(adapter: ModuleType):
    batch = rows(0)
    without = batch_of(batch) | {"rollout_log_probs": []}
    with pytest.raises(InputError, match="rollout_log_probs is missing"):
        adapter.loss(arguments(), without, logits_of(batch), reduction(batch, True))


def test_masks_of_other_lengths_than_this_ranks_tokens_are_left_to_slime(adapter: ModuleType):
    """Under context parallelism a rank has a part of each sample's tokens, and slime's masks are whole."""
    batch = rows(3)
    half = Rows(batch.logp[:, :5], batch.behavior_logp[:, :5], batch.advantage, batch.keep[:, :5])
    local = batch_of(half) | {"loss_masks": batch_of(batch)["loss_masks"]}
    logits = logits_of(half)
    loss, _ = adapter.loss(arguments(context_parallel_size=2), local, logits, reduction(half, False))
    assert loss.isfinite()


def test_the_stand_in_has_what_is_relied_on():
    for function in (policy_loss_function, compute_policy_loss):
        assert list(inspect.signature(function).parameters) == RELIED_ON[function.__name__]


@pytest.mark.adapters
def test_the_framework_has_what_is_relied_on():
    framework = pytest.importorskip(FRAMEWORK)
    source = inspect.getsource(framework.policy_loss_function)
    assert list(inspect.signature(framework.policy_loss_function).parameters) == RELIED_ON["policy_loss_function"]
    assert "compute_policy_loss(" in source and all(text in source for text in SOURCE)
