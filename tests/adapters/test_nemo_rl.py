"""drpo inside NeMo-RL, whose loss is played by a stand-in written from its documented formula."""

import pickle
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.cases import EVERY, Rows, direct_gradient, rows
from drpo.adapters import require_ran
from drpo.adapters.nemo_rl import MUST_BE, reweighted
from drpo.errors import InputError
from drpo.objectives import DRPO

# What this adapter relies on: NVIDIA-NeMo/RL, nemo_rl/algorithms/loss/loss_functions.py as of commit 006907a9570734f3
# (ClippedPGLossFn) and interfaces.py as of 002cdc27b8019eaf (LossFunction).
RELIED_ON = {
    "attributes": {"input_type", "loss_type", "metric_normalizations", "ratio_clip_min", "ratio_clip_max", *MUST_BE},
    "call": ["self", "next_token_logprobs", "data", "global_valid_seqs", "global_valid_toks"],
    "data": {"advantages", "generation_logprobs", "prev_logprobs", "token_mask", "sample_mask"},
    "metrics": {"probs_ratio"},
}
NAN = float("nan")


class InputType(Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"


def mean(values: Tensor, mask: Tensor, count: Tensor | None = None, dim: int | None = None) -> Tensor:
    return (values * mask).sum(dim) / (mask.sum(dim) if count is None else count).clamp(min=1e-8)


@dataclass
class StandIn:
    """PPO's clipped surrogate, times prev / generation where that is corrected for, plus a k3 penalty."""

    by_token: bool = True
    use_importance_sampling_correction: bool = True
    reference_policy_kl_penalty: float = 0.0
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    force_on_policy_ratio: bool = False
    disable_ppo_ratio: bool = False
    sequence_level_importance_ratios: bool = False
    use_cispo: bool = False
    truncated_importance_sampling_type: str | None = None
    truncated_importance_sampling_ratio: float | None = None
    input_type: InputType = InputType.LOGPROB
    loss_type: str = "of the framework"
    metric_normalizations: dict[str, str] = field(default_factory=lambda: {"probs_ratio": "tokens", "loss": "loss"})

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
        previous, generated = data["prev_logprobs"][:, 1:], data["generation_logprobs"][:, 1:]
        advantages = data["advantages"][:, 1:]
        ratio = (next_token_logprobs - previous).exp()
        clipped = ratio.clamp(1 - self.ratio_clip_min, 1 + self.ratio_clip_max)
        loss = torch.max(-advantages * ratio, -advantages * clipped)
        if self.use_importance_sampling_correction:
            loss = loss * (previous - generated).exp()
        off = data["reference_policy_logprobs"][:, 1:] - next_token_logprobs
        loss = loss + self.reference_policy_kl_penalty * (off.exp() - 1 - off)
        keep = token_mask * sample_mask.unsqueeze(1)
        if self.by_token:
            value = mean(loss, keep, global_valid_toks)
        else:
            value = mean(mean(loss, token_mask, dim=1), sample_mask, global_valid_seqs)
        return value, {"loss": value.item(), "probs_ratio": mean(ratio.detach(), keep, global_valid_toks).item()}


def data_of(batch: Rows) -> dict[str, Tensor]:
    """[B, S]: a prompt's token stands before the rows' tokens. The last row counts nothing."""

    def shifted(values: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(values[:, :1]), values), 1)

    sample_mask = torch.ones(len(batch.logp))
    sample_mask[0] = 0
    return {
        "token_mask": shifted(batch.keep.float()),
        "sample_mask": sample_mask,
        "advantages": shifted(batch.advantage.unsqueeze(1).expand(batch.logp.shape)),
        "generation_logprobs": shifted(batch.behavior_logp),
        "prev_logprobs": shifted(batch.logp - 0.3),
        "reference_policy_logprobs": shifted(batch.logp - 0.2),
    }


def counted(batch: Rows) -> Rows:
    keep = batch.keep.clone()
    keep[0] = False
    return Rows(batch.logp, batch.behavior_logp, batch.advantage, keep)


SEQS, TOKS = torch.tensor(7.0), torch.tensor(90.0)


def gradient(loss_fn: Any, batch: Rows, data: dict[str, Tensor]) -> Tensor:
    logp = batch.logp.clone().requires_grad_()
    value, _ = loss_fn(next_token_logprobs=logp, data=data, global_valid_seqs=SEQS, global_valid_toks=TOKS)
    (slope,) = torch.autograd.grad(value, logp)
    return slope


def token_weight(batch: Rows, by_token: bool) -> Tensor:
    one = 1 / TOKS if by_token else 1 / SEQS / batch.keep.sum(1, keepdim=True)
    return one.expand(batch.logp.shape)


@pytest.mark.parametrize("spec", [*EVERY, "gspo(0.2, 0.3)"])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
def test_the_frameworks_loss_has_the_objectives_gradient(spec: str, by_token: bool, corrected: bool):
    framework = StandIn(by_token, use_importance_sampling_correction=corrected)
    for seed in range(3):
        batch = rows(seed)
        found = gradient(reweighted(framework, spec), batch, data_of(batch))
        wanted = direct_gradient(spec, counted(batch), token_weight(batch, by_token))
        assert (found - wanted).abs().max() < 1e-6


def test_the_reference_penalty_stays_the_frameworks():
    batch, framework = rows(0), StandIn(reference_policy_kl_penalty=0.5)
    data = data_of(batch)
    penalty = gradient(framework, batch, data | {"advantages": torch.zeros_like(data["advantages"])})
    wanted = direct_gradient("drpo(0.2)", counted(batch), token_weight(batch, True)) + penalty
    assert (gradient(reweighted(framework, "drpo(0.2)"), batch, data) - wanted).abs().max() < 1e-6
    assert penalty.abs().max() > 1e-4


def test_a_filtered_token_has_no_gradient_and_an_unscored_one_is_on_policy():
    batch = rows(4)
    data = data_of(batch)
    data["generation_logprobs"][1, 1] = NAN
    data["curr_logprobs_keep_mask"] = torch.ones_like(batch.logp)
    data["curr_logprobs_keep_mask"][2, 0] = 0
    slope = gradient(reweighted(StandIn(), "drpo(0.2)"), batch, data)
    assert slope.isfinite().all()
    assert slope[1, 0] == pytest.approx((-batch.advantage[1] / TOKS).item()) and slope[2, 0] == 0


def test_neither_the_loss_nor_the_batch_that_is_handed_in_changes():
    framework, batch = StandIn(), rows(0)
    data = data_of(batch)
    before, settings = {name: values.clone() for name, values in data.items()}, repr(framework)
    gradient(reweighted(framework, "drpo(0.2)"), batch, data)
    assert repr(framework) == settings and all(torch.equal(data[name], values) for name, values in before.items())


def test_figures_add_up_over_micro_batches():
    batch, loss_fn = rows(1), reweighted(StandIn(), "drpo(0.2)")
    data = data_of(batch)
    n_kept = counted(batch).keep.sum()

    def seen(part: slice) -> dict[str, float]:
        values = {name: each[part] for name, each in data.items()}
        metrics = loss_fn(batch.logp[part], values, SEQS, n_kept)[1]
        return {name: each for name, each in metrics.items() if name.startswith("drpo/")}

    whole, first, second = seen(slice(0, 4)), seen(slice(0, 2)), seen(slice(2, 4))
    names = {"drpo/prob_diff_mean", "drpo/out_of_region", "drpo/unscored", "drpo/loss_tokens/drpo_0.2"}
    assert set(whole) == names and whole["drpo/loss_tokens/drpo_0.2"] == n_kept
    assert whole == pytest.approx({name: first[name] + second[name] for name in whole})
    moved = (batch.logp.exp() - batch.behavior_logp.exp()).abs()[counted(batch).keep]
    assert whole["drpo/prob_diff_mean"] == pytest.approx(moved.mean().item()) and whole["drpo/out_of_region"] > 0


def test_a_step_with_the_frameworks_own_loss_is_noticed():
    """As where its controller builds the loss again."""
    batch, objective = rows(1), DRPO(0.2)
    _, ours = reweighted(StandIn(), "drpo(0.2)")(batch.logp, data_of(batch), SEQS, TOKS)
    _, theirs = StandIn()(batch.logp, data_of(batch), SEQS, TOKS)
    require_ran(ours, objective)
    with pytest.raises(InputError, match="trained with a loss of its own"):
        require_ran(theirs, objective)


def test_it_reaches_a_worker_and_answers_for_the_frameworks_loss():
    batch = rows(0)
    loss_fn = reweighted(StandIn(by_token=False), "dppo(0.15)")
    arrived = pickle.loads(pickle.dumps(loss_fn))
    assert torch.equal(gradient(arrived, batch, data_of(batch)), gradient(loss_fn, batch, data_of(batch)))
    assert arrived.loss_type == "of the framework" and arrived.input_type is InputType.LOGPROB
    assert (
        arrived.metric_normalizations["drpo/out_of_region"] == "tokens"
        and arrived.metric_normalizations["loss"] == "loss"
    )
    assert not hasattr(arrived, "another")


@pytest.mark.parametrize(
    ("setting", "value", "must"),
    [
        ("force_on_policy_ratio", True, "must be false, since"),
        ("disable_ppo_ratio", True, "must be false, since"),
        ("sequence_level_importance_ratios", True, "must be false, since GSPO is written as"),
        ("use_cispo", True, "must be false, since CISPO is written as"),
        ("ratio_clip_c", 3.0, "must be null, since"),
        ("truncated_importance_sampling_type", "tis", "must be null, since"),
        ("truncated_importance_sampling_ratio", 2.0, "must be null, since"),
    ],
)
def test_refused_settings(setting: str, value: Any, must: str):
    with pytest.raises(InputError) as refused:
        reweighted(StandIn(**{setting: value}), "drpo(0.2)")
    told = str(refused.value)
    assert told.startswith(f"loss_fn.{setting}={value}: {must}") and "\n" not in told


def test_a_loss_of_logits_is_refused():
    with pytest.raises(InputError, match=r"^loss_fn StandIn: must take log-probabilities"):
        reweighted(StandIn(input_type=InputType.LOGIT), "drpo(0.2)")


def test_an_objective_must_be_written():
    with pytest.raises(InputError, match=r"^loss_fn\.drpo_objective is not set"):
        reweighted(StandIn(), "")


def test_the_stand_in_has_what_is_relied_on():
    assert vars(StandIn()).keys() >= RELIED_ON["attributes"]
    assert data_of(rows(0)).keys() >= RELIED_ON["data"]


@pytest.mark.adapters
def test_the_framework_has_what_is_relied_on():
    functions = pytest.importorskip("nemo_rl.algorithms.loss.loss_functions")
    code = functions.ClippedPGLossFn.__call__.__code__
    assert list(code.co_varnames[: code.co_argcount]) == RELIED_ON["call"]
    assert set(functions.ClippedPGLossFn.__init__.__code__.co_names) >= RELIED_ON["attributes"] - {"input_type"}
    assert set(code.co_consts) >= RELIED_ON["data"]
