"""The contract of prime-rl's custom loss, as it stands in its repository, and our loss under it.

Facts relied on, read in PrimeIntellect-ai/prime-rl, src/prime_rl/trainer/rl/loss.py at commit 349283d, and in
docs/algorithms.md ("Custom Loss") at commit 004274e:
- `trainer.loss.import_path` names a function by its dotted path; it is called as `f(inputs, **trainer.loss.kwargs)`,
  once for each packed sequence, with `inputs` as the only positional argument.
- `inputs` has `trainer_logprobs`, `inference_logprobs`, `advantages`, `loss_mask` (bool) of shape [T], `loss_weights`
  (or None), and others that come and go (`teacher_logprobs`, `ref_logprobs`, `trainer_mask_logprobs`).
- The mask is the loss mask where the weight is not 0; without weights the function is called for an empty mask too.
- Of the result `loss` (scalar) and `metrics` (a dict of tensors) are read. Losses are added up and divided by the
  number of trained tokens of the global batch; scalars of one name are stacked.
Read again at commit 559b447, and in the text of September 2026, after pull requests 3526 and 3586: `setup_rl_loss_fn`
and `compute_loss` do all of this. In the latter losses are objects, `CustomLoss.loss(inputs)` calls the function, and
the divisor is the sum of the weights.
None of prime-rl runs here: it installs from git alone, with a pinned CUDA stack.
"""

import importlib
import inspect
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.cases import EVERY, SEQUENCE, Rows, direct_gradient, rows
from adapters.pages import PAGES, run_page
from adapters.parity import record
from drpo.adapters import prime_rl, require_ran
from drpo.errors import InputError
from drpo.objectives import DRPO

READ_AT = "git 349283d"


@dataclass(frozen=True)
class Inputs:
    """What prime-rl makes for one sequence; the reference's and the masks' log-probabilities are ours to ignore."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None
    trainer_mask_logprobs: Tensor | None = None
    inference_mask_logprobs: Tensor | None = None


def configured(text: str) -> Callable[[Inputs], Any]:
    """The loss that a [trainer.loss] table of TOML sets up."""
    table = tomllib.loads(text)["trainer"]["loss"]
    assert table["type"] == "custom"
    module, name = table["import_path"].rsplit(".", 1)
    function = getattr(importlib.import_module(module), name)
    return lambda inputs: function(inputs, **table["kwargs"])


def toml(spec: str) -> str:
    return f"""[trainer.loss]
type = "custom"
import_path = "drpo.adapters.prime_rl.drpo_loss"
kwargs = {{ objective = "{spec}" }}
"""


def sequences(batch: Rows, logp: Tensor, weights: Tensor | None) -> list[Inputs]:
    """A batch as prime-rl hands it out, one unpadded sequence after the other."""
    made = []
    for i in range(len(batch.logp)):
        mask = batch.keep[i] if weights is None else batch.keep[i] & (weights[i] != 0)
        spread = batch.advantage[i].expand(logp.shape[1])
        weight = None if weights is None else weights[i]
        made.append(Inputs(logp[i], batch.behavior_logp[i], None, spread, mask, weight))
    return made


def whole_loss(loss_of: Callable[[Inputs], Any], inputs: list[Inputs], scale: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's loss and metrics, put together as prime-rl does: sums over sequences, scalars stacked by name."""
    total = inputs[0].trainer_logprobs.sum() * 0.0
    metrics: dict[str, list[Tensor]] = {}
    for one in inputs:
        if one.loss_weights is not None and not one.loss_mask.any():
            continue
        result = loss_of(one)
        total = total + result.loss
        for name, value in result.metrics.items():
            metrics.setdefault(name, []).append(value)
    return total / scale, {name: torch.stack(values) for name, values in metrics.items()}


def weights_of(batch: Rows, seed: int) -> Tensor:
    """Factors per token, some of them 0: those tokens are not this loss's."""
    drawn = torch.rand(batch.logp.shape, generator=torch.Generator().manual_seed(seed)) + 0.25
    return torch.where(drawn < 0.5, 0.0, drawn).to(batch.logp.dtype)


def test_signature_stands():
    parameters = list(inspect.signature(prime_rl.drpo_loss).parameters.values())
    assert [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY]
    assert [p.name for p in parameters] == ["inputs", "objective"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spec", [*EVERY, SEQUENCE])
def test_gradient_through_the_wiring(spec: str, weighted: bool):
    worst = 0.0
    for seed in range(2):
        batch = rows(seed)
        weights = weights_of(batch, seed) if weighted else None
        logp = batch.logp.clone().requires_grad_()
        scale = int(batch.keep.sum())
        loss, _ = whole_loss(configured(toml(spec)), sequences(batch, logp, weights), scale)
        (slope,) = torch.autograd.grad(loss, logp)
        each = torch.full_like(batch.logp, 1 / scale) * (1 if weights is None else weights)
        trained = replace(batch, keep=batch.keep & (each != 0))
        worst = max(worst, (slope.double() - direct_gradient(spec, trained, each)).abs().max().item())
    record("prime-rl (contract)" + (", loss_weights" if weighted else ""), READ_AT, spec, worst)
    assert worst < 1e-6


def test_loss_is_the_sum_over_trained_tokens():
    logp = torch.tensor([-0.5, -0.7, -0.9]).requires_grad_()
    one = Inputs(logp, logp.detach(), None, torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, True, False]))
    loss_of = configured(toml("none"))
    assert loss_of(one).loss.item() == -3.0
    assert loss_of(replace(one, loss_weights=torch.tensor([0.5, 2.0, 8.0]))).loss.item() == -4.5


@pytest.mark.parametrize("junk", [math.nan, math.inf, 7.0])
def test_what_stands_outside_the_mask_has_no_effect(junk: float):
    batch, loss_of = rows(3, dtype=torch.float64), configured(toml("drpo(0.2)"))

    def one(row: int, fill: float) -> tuple[Tensor, ...]:
        keep = batch.keep[row]
        columns = [
            torch.where(keep, values.expand(keep.shape), fill)
            for values in (batch.logp[row], batch.behavior_logp[row], batch.advantage[row], torch.tensor(0.5))
        ]
        logp = columns[0].requires_grad_()
        result = loss_of(Inputs(logp, columns[1], None, columns[2], keep, columns[3].double()))
        (slope,) = torch.autograd.grad(result.loss, logp)
        assert slope.isfinite().all() and (slope[~keep] == 0).all()
        return result.loss.detach(), slope, *result.metrics.values()

    for row in range(len(batch.logp)):
        assert all(torch.equal(a, b) for a, b in zip(one(row, 0.0), one(row, junk), strict=True))


def test_a_sequence_without_trained_tokens_still_has_a_gradient():
    logp = torch.full((4,), -1.0).requires_grad_()
    empty = Inputs(logp, logp.detach(), None, torch.ones(4), torch.zeros(4, dtype=torch.bool))
    loss, metrics = whole_loss(configured(toml("drpo(0.2)")), [empty], 1)
    loss.backward()
    assert loss.item() == 0 and logp.grad is not None and (logp.grad == 0).all()
    assert all(value.isfinite().all() for value in metrics.values())


def test_metrics_stack():
    batch = rows(1)
    _, metrics = whole_loss(configured(toml("drpo(0.2)")), sequences(batch, batch.logp, None), 1)
    assert set(metrics) == {
        f"drpo/{n}" for n in ("prob_diff_mean", "prob_diff_max", "out_of_region", "weight_min", "unscored")
    } | {"drpo/loss_tokens/drpo_0.2"}
    moved = (batch.logp.exp() - batch.behavior_logp.exp()).abs()
    longest = torch.stack([moved[i][batch.keep[i]].max() for i in range(len(moved))])
    assert torch.allclose(metrics["drpo/prob_diff_max"], longest)
    assert not any(value.requires_grad for value in metrics.values())


def test_a_step_with_another_loss_is_noticed():
    """`type = "custom"` left out: the trainer computes its default loss, and never imports ours."""
    batch = rows(1)
    _, ours = whole_loss(configured(toml("drpo(0.2)")), sequences(batch, batch.logp, None), 1)
    require_ran(ours, DRPO(0.2))

    def default(inputs: Inputs) -> Any:
        ratio = (inputs.trainer_logprobs - inputs.inference_logprobs).exp()
        return SimpleNamespace(
            loss=-(ratio * inputs.advantages)[inputs.loss_mask].sum(), metrics={"masked": ratio.mean()}
        )

    _, theirs = whole_loss(default, sequences(batch, batch.logp, None), 1)
    with pytest.raises(InputError, match=r"^the step's metrics have no drpo/loss_tokens/drpo_0.2"):
        require_ran(theirs, DRPO(0.2))


def test_inputs_of_older_versions_fit():
    logp = torch.tensor([-0.5]).requires_grad_()
    older = SimpleNamespace(
        trainer_logprobs=logp,
        inference_logprobs=logp.detach(),
        teacher_logprobs=None,
        advantages=torch.ones(1),
        loss_mask=torch.tensor([True]),
        loss_weights=None,
    )
    assert configured(toml("drpo(0.2)"))(older).loss.item() == -1.0


def test_refusals():
    logp = torch.tensor([-0.5]).requires_grad_()
    one = Inputs(logp, logp.detach(), None, torch.ones(1), torch.tensor([True]))
    with pytest.raises(InputError, match=r"trainer\.loss\.kwargs\.objective is not set: .*'drpo\(0\.2\)'"):
        prime_rl.drpo_loss(one)
    with pytest.raises(InputError, match="reads the sampler's top-K"):
        prime_rl.drpo_loss(one, objective="dppo(0.15, divergence='topk_tv')")


def test_page():
    page = (PAGES / "prime_rl.md").read_text()
    loss_of = configured(page.split("```toml\n")[1].split("```")[0])
    logp = torch.tensor([-0.5]).requires_grad_()
    assert loss_of(Inputs(logp, logp.detach(), None, torch.ones(1), torch.tensor([True]))).loss.item() == -1.0
    run_page("prime_rl")
