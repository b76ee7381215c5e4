"""The shared piece: a framework's clipped surrogate with our advantage has the objective's gradient."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.cases import SPECS, Rows, direct_gradient, rows
from drpo import objectives
from drpo.adapters import figures, objective_of, reweight, token_loss, warn_untested
from drpo.errors import InputError
from drpo.spec import parse_spec

EVERY = (*SPECS, "tis(2)", "sapo(1, 1.05)", "mask(0.1)", "gspo(0.2, 0.3)", "drpo(0.2, advantage_weighted=False)")

FEW = settings(max_examples=settings.default.max_examples // 4)  # of each objective


def framework_gradient(batch: Rows, advantage: Tensor, weight: Tensor) -> Tensor:
    """What a framework's own loss gives: old := mu, no clip, mask by multiplication."""
    logp = batch.logp.clone().requires_grad_()
    mu = torch.where(batch.keep, batch.behavior_logp, logp.detach())
    ratio = torch.exp(logp - mu)
    loss = -torch.min(ratio * advantage, ratio.clamp(0, math.inf) * advantage)
    (slope,) = torch.autograd.grad((loss * weight * batch.keep).sum(), logp)
    return slope


def row_weights(batch: Rows, draw: int) -> Tensor:
    """The same for all tokens of a row, as in every aggregation of the frameworks."""
    return torch.rand(len(batch.logp), 1, generator=torch.Generator().manual_seed(draw)).expand(batch.logp.shape)


@pytest.mark.parametrize("spec", EVERY)
@FEW
@given(seed=st.integers(0, 10**6))
def test_reweighted_surrogate_has_the_objectives_gradient(spec: str, seed: int):
    batch = rows(seed)
    weight = row_weights(batch, seed)
    objective = parse_spec(spec, objectives.REGISTRY)
    weighed = reweight(objective, batch.logp, batch.behavior_logp, batch.advantage, batch.keep)
    wanted = direct_gradient(spec, batch, weight)
    assert torch.allclose(framework_gradient(batch, weighed, weight).double(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("spec", EVERY)
@FEW
@given(seed=st.integers(0, 10**6))
def test_token_loss_has_the_objectives_gradient(spec: str, seed: int):
    batch = rows(seed, dtype=torch.float64)
    weight = row_weights(batch, seed).double()
    logp = batch.logp.clone().requires_grad_()
    loss = token_loss(parse_spec(spec, objectives.REGISTRY), logp, batch.behavior_logp, batch.advantage, batch.keep)
    assert (loss[~batch.keep] == 0).all()
    (slope,) = torch.autograd.grad((weight * loss).sum(), logp)
    assert torch.allclose(slope, direct_gradient(spec, batch, weight), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", EVERY)
@pytest.mark.parametrize(
    "junk", [math.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (math.inf, -math.inf, 7.0))]
)
def test_what_stands_in_padding_has_no_effect(spec: str, junk: float):
    objective, clean = parse_spec(spec, objectives.REGISTRY), rows(3)

    def spoilt(values: Tensor) -> Tensor:
        return torch.where(clean.keep, values, junk)

    dirty = Rows(spoilt(clean.logp), spoilt(clean.behavior_logp), clean.advantage, clean.keep)
    for batch_of in (reweight, token_loss):
        a = batch_of(objective, clean.logp, clean.behavior_logp, clean.advantage, clean.keep)
        b = batch_of(objective, dirty.logp, dirty.behavior_logp, dirty.advantage, dirty.keep)
        assert torch.equal(a, b) and (a[~clean.keep] == 0).all()
    leaf = dirty.logp.clone().requires_grad_()
    token_loss(objective, leaf, dirty.behavior_logp, dirty.advantage, dirty.keep).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and (leaf.grad[~clean.keep] == 0).all()
    seen = [figures(objective, x.logp, x.behavior_logp, x.advantage, x.keep) for x in (clean, dirty)]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("missing", [math.nan, -math.inf, -9999.0, -9984.0])  # the last two: vLLM's server, in bfloat16
def test_a_token_that_the_sampler_could_not_score_is_taken_as_on_policy(missing: float):
    batch = rows(1)
    mu = batch.behavior_logp.clone()
    mu[0, 0] = missing
    weighed = reweight(parse_spec("drpo(0.2)", objectives.REGISTRY), batch.logp, mu, batch.advantage, batch.keep)
    assert weighed[0, 0] == batch.advantage[0]
    seen = figures(parse_spec("drpo(0.2)", objectives.REGISTRY), batch.logp, mu, batch.advantage, batch.keep)
    assert seen["unscored"] == 1 / batch.keep.sum()
    assert (
        figures(parse_spec("none", objectives.REGISTRY), batch.logp, batch.behavior_logp, batch.advantage, batch.keep)[
            "unscored"
        ]
        == 0
    )


def test_advantages_by_row_by_column_and_by_token_are_the_same():
    batch = rows(2)
    drpo = parse_spec("drpo(0.2)", objectives.REGISTRY)
    by_row = batch.advantage
    for advantage in (by_row.unsqueeze(1), by_row.unsqueeze(1).expand(batch.logp.shape)):
        assert torch.equal(
            reweight(drpo, batch.logp, batch.behavior_logp, advantage, batch.keep),
            reweight(drpo, batch.logp, batch.behavior_logp, by_row, batch.keep),
        )


@pytest.mark.parametrize("spec", ["drpo(0.2)", "gspo(0.2, 0.3)"])
def test_packed_tokens_with_their_sequences_equal_padded_rows(spec: str):
    batch, objective = rows(5), parse_spec(spec, objectives.REGISTRY)
    sequence = torch.arange(len(batch.logp)).unsqueeze(1).expand(batch.logp.shape)
    spread = batch.advantage.unsqueeze(1).expand(batch.logp.shape)
    flat = [x[batch.keep] for x in (batch.logp, batch.behavior_logp, spread, batch.keep, sequence)]
    padded = reweight(objective, batch.logp, batch.behavior_logp, batch.advantage, batch.keep)
    assert torch.allclose(reweight(objective, *flat), padded[batch.keep], atol=1e-6)


@pytest.mark.parametrize("log_ratio", [-200.0, -60.0, 19.0, 40.0])
def test_ratios_beyond_all_bounds_stay_finite(log_ratio: float):
    logp = torch.tensor([min(log_ratio, 0.0) - 1.0])
    mu = logp - log_ratio
    for spec in EVERY:
        weighed = reweight(parse_spec(spec, objectives.REGISTRY), logp, mu, torch.tensor([-1.0]), torch.tensor([True]))
        assert weighed.isfinite().all(), spec


def test_figures_of_nothing():
    batch = replace(rows(0), keep=torch.zeros_like(rows(0).keep))
    seen = figures(
        parse_spec("drpo(0.2)", objectives.REGISTRY), batch.logp, batch.behavior_logp, batch.advantage, batch.keep
    )
    assert {name: value.item() for name, value in seen.items()} == {
        "prob_diff_mean": 0.0,
        "prob_diff_max": 0.0,
        "out_of_region": 0.0,
        "weight_min": 1.0,
        "unscored": 0.0,
        "loss_tokens/drpo_0.2": 0.0,
    }


def test_figures_count_kept_tokens_alone():
    pi, mu = torch.tensor([[0.5, 0.3, 0.9]]), torch.tensor([[0.1, 0.3, 0.1]])
    seen = figures(
        parse_spec("drpo(0.2)", objectives.REGISTRY), pi.log(), mu.log(), torch.ones(1), torch.tensor([[1, 1, 0]])
    )
    assert seen["prob_diff_mean"].item() == pytest.approx(0.2) and seen["out_of_region"].item() == 0.5
    assert seen["prob_diff_max"].item() == pytest.approx(0.4) and seen["weight_min"].item() == pytest.approx(-1.0)


def test_refusals():
    batch = rows(0)
    drpo = parse_spec("drpo(0.2)", objectives.REGISTRY)
    with pytest.raises(InputError, match=r"behavior_logp \[4\]: must have the shape of logp, \[4, 11\]"):
        reweight(drpo, batch.logp, batch.behavior_logp[:, 0], batch.advantage, batch.keep)
    with pytest.raises(
        InputError, match=r"advantage \[3\]: must have the shape of logp, \[4, 11\], or one value a row"
    ):
        reweight(drpo, batch.logp, batch.behavior_logp, batch.advantage[:3], batch.keep)
    with pytest.raises(InputError, match=r"loss\.objective is not set: .*loss\.objective='drpo\(0\.2\)'"):
        objective_of("", "loss.objective")
    with pytest.raises(InputError, match="reads the sampler's top-K log-probabilities"):
        objective_of("dppo(0.15, divergence='topk_tv')", "objective")
    for spec in ("m2po", "kl_cov(0.1)", "reinforce*weight('token', 2, normalize=True)"):
        with pytest.raises(InputError, match="reads statistics of the whole optimiser batch, of which this framework"):
            objective_of(spec, "objective")
    with pytest.raises(InputError, match=r"besides the sampler's; leave '\*proximal' \(in vespo: max_ratio\) out"):
        objective_of("ppo*proximal*weight('token', 5)", "objective")
    with pytest.raises(
        InputError, match=r"reads the reward of each answer, .* such as .reinforce\*weight\('token', 1\.0\)"
    ):
        objective_of("topr", "objective")
    objective_of("drpo_eff(0.2)", "objective")
    with pytest.raises(InputError, match="is a factor: write it behind an objective"):
        objective_of("band(0.5, 2)", "objective")
    with pytest.raises(InputError, match="did you mean 'drpo'"):
        objective_of("dropo(0.2)", "objective")


def test_untested_versions_are_named():
    with pytest.warns(UserWarning, match=r"torch .* is not between 0\.1 and 0\.2"):
        warn_untested("torch", "0.1", "0.2")
    with pytest.warns(UserWarning, match="is not between 98 and 99"):
        warn_untested("torch", "98", "99")
