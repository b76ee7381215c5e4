"""The small world: a run in a batch is the run by itself, by the plain loop; the sampler's numbers are the model's."""

import json
import math
from dataclasses import replace
from itertools import product
from math import sqrt
from pathlib import Path

import pytest
import torch
from torch import Tensor

import regions
import regions_check
import regions_page
import small_world as small
import study_runs
from brake import Brake
from drpo.objectives import (
    CPPO,
    DPPO,
    DRPO,
    GSPO,
    ImportanceSampling,
    PPOClip,
    Tokens,
    gradient_weight,
    total,
)
from drpo.reductions import Horizon
from small_world import GROUP, GROUPS, LENGTH, ROWS, Regime, Run, World

WORLDS = (World(), World(turn=True), World(sharp=True, experts=4))


@pytest.fixture(autouse=True)
def untaught(monkeypatch: pytest.MonkeyPatch):
    """A model that has learnt nothing, in place of the speaker, which takes seconds."""

    def random(world: World) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        shapes = world.shapes.values()
        return torch.cat([(torch.randn(s, generator=generator) / sqrt(s[0])).flatten() for s in shapes])[None]

    monkeypatch.setattr(small, "speaker", random)


def by_hand(world: World, theta: Tensor, prompt: Tensor, text: Tensor) -> Tensor:
    """Return log-probabilities [L] of one text by one model, written out: no batch, no fused attention."""
    w = {name: x[0] for name, x in small.unpack(world, theta[None]).items()}

    def normed(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    x = w["embed"][torch.cat([prompt[None], text[:-1]])] + w["place"]
    q, k, v = (normed(x) @ w["qkv"]).chunk(3, -1)
    scores = (q @ k.T / sqrt(small.WIDTH)).masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf)
    x = x + scores.softmax(-1) @ v @ w["out"]
    hidden = (normed(x) @ w["up"]).relu()
    if world.experts > 1:
        scores = normed(x) @ w["router"]
        values, chosen = scores.topk(small.ACTIVE, -1)
        gates = torch.zeros_like(scores).scatter(-1, chosen, values.softmax(-1))
        hidden = hidden * gates.repeat_interleave(hidden.shape[-1] // world.experts, -1)
    logits = normed(x + hidden @ w["down"]) @ w["head"]
    return logits.log_softmax(-1).gather(-1, text[:, None])[:, 0]


def models(world: World, m: int) -> Tensor:
    """Return m models that differ."""
    noise = 0.1 * torch.randn(m, 1, generator=torch.Generator().manual_seed(1))
    return small.speaker(world) * (1 + noise)


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_log_probabilities_and_gradients_are_those_of_each_model_by_itself(world: World):
    theta = models(world, 3).double().requires_grad_()
    prompts, text = torch.randint(3, 11, (3, 2)), torch.randint(small.VOCABULARY, (3, 2, LENGTH))
    logp = small.token_logp(world, small.unpack(world, theta), prompts, text)
    (batched,) = torch.autograd.grad(logp.square().sum(), theta)
    for m in range(3):
        one = theta[m].detach().requires_grad_()
        alone = torch.stack([by_hand(world, one, prompts[m, b], text[m, b]) for b in range(2)])
        torch.testing.assert_close(logp[m].detach(), alone.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(batched[m], torch.autograd.grad(alone.square().sum(), one)[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_a_sampler_in_fp32_reports_the_models_log_probabilities(world: World):
    weights = small.sampler_weights(world, models(world, 2), "fp32")
    prompts, cues, any_cues, uniform = small._problems(world, [Run(DRPO(0.2), 1e-3, s) for s in (0, 1)], 0, 2, 2)
    sampled = small.answers(world, weights, prompts, cues, any_cues, uniform)
    keep = world.kept
    logp = small.token_logp(world, weights, prompts, sampled.text)
    torch.testing.assert_close(sampled.logp[..., keep], logp[..., keep], rtol=1e-4, atol=1e-4)
    if sampled.routes is not None:  # routes replayed are routes chosen, where both are fp32
        replayed = small.token_logp(world, weights, prompts, sampled.text, sampled.routes.flatten(1, 2))
        torch.testing.assert_close(replayed, logp, rtol=1e-4, atol=1e-4)
    if world.turn:
        said = small.CUES + torch.where(sampled.text[..., 0] == small.CALL, cues, any_cues)
        assert (sampled.text[..., 1] == said).all() and (sampled.logp[..., 1] == 0).all()


def test_words_are_drawn_by_their_probabilities():
    world, n = World(), 4000
    prompts, cues, any_cues, uniform = small._problems(world, [Run(DRPO(0.2), 1e-3, 0)], 0, n, 1)
    prompts = torch.full_like(prompts, small.CUES)
    weights = small.unpack(world, small.speaker(world))
    first = small.answers(world, weights, prompts, cues, any_cues, uniform).text[0, :, 0]
    every = torch.arange(small.VOCABULARY)[None, :, None].expand(-1, -1, LENGTH)
    p = small.token_logp(world, weights, torch.full((1, small.VOCABULARY), small.CUES), every)[0, :, 0].exp()
    counts = torch.bincount(first, minlength=small.VOCABULARY)
    expected = n * p
    assert float(((counts - expected) ** 2 / expected).sum()) < 200  # chi squared, 127 degrees of freedom


def test_what_is_right_is_of_the_class_and_of_the_places_kind():
    text = torch.full((1, 1, LENGTH), small.FIRST_COMMON + 3)
    cues = torch.tensor([[3]])
    assert World().reward(text, cues).item() == 0.5  # the common places
    text[..., 1::2] = small.FIRST_RARE + 3 + small.CLASSES
    assert World().reward(text, cues).item() == 1 and World().reward(text, cues + 1).item() == 0
    assert World(turn=True).reward(text, cues).item() == 1


def plain_loop(regime: Regime, run: Run) -> tuple[Tensor, list[Tensor]]:
    """Train one run by torch.optim and clip_grad_norm_; return the weights, and the losses of its updates."""
    theta = small.speaker(regime.world)[0].clone().requires_grad_()
    optimizer = torch.optim.AdamW([theta], run.rate * regime.heat, weight_decay=0)
    keep = regime.world.kept.repeat(ROWS)
    sequence = torch.arange(ROWS).repeat_interleave(LENGTH)
    losses = []
    for rollout in range(regime.steps // regime.updates):
        weights = small.sampler_weights(regime.world, theta[None], regime.precision, regime.router)
        drawn = small._problems(regime.world, [run], rollout, regime.updates * GROUPS, GROUP)
        sampled = small.answers(regime.world, weights, *drawn)
        reward = regime.world.reward(sampled.text, drawn[1])[0].view(-1, GROUP)
        advantage = (reward - reward.mean(1, keepdim=True)).flatten()
        for update in range(regime.updates):
            rows = range(update * ROWS, (update + 1) * ROWS)
            logp = torch.stack([by_hand(regime.world, theta, drawn[0][0, b], sampled.text[0, b]) for b in rows])
            mu = sampled.logp[0, list(rows)].flatten()
            each = advantage[list(rows), None].expand(-1, LENGTH).flatten()
            tokens = Tokens(logp.flatten(), mu, each, keep, sequence)
            loss = total(run.objective, tokens, Horizon(LENGTH)(keep, sequence))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([theta], 1.0)
            optimizer.step()
            losses.append(loss.detach())
    return theta.detach(), losses


@pytest.mark.parametrize(
    "regime",
    [Regime(updates=2, steps=4), Regime(World(turn=True), updates=4, precision="int8", steps=4)],
    ids=["dense", "turn"],
)
def test_a_run_in_a_batch_is_the_run_by_the_plain_loop(regime: Regime, monkeypatch: pytest.MonkeyPatch):
    objectives = (DRPO(0.2), PPOClip(0.2, 0.28), GSPO(), CPPO())
    runs = [Run(o, rate, seed) for o, (rate, seed) in product(objectives, ((1e-3, 0), (2e-3, 7)))]
    trained: list[Tensor] = []
    evaluate = small._evaluate

    def kept(regime: Regime, runs: list[Run], theta: Tensor) -> Tensor:
        trained.append(theta.detach().clone())
        return evaluate(regime, runs, theta)

    monkeypatch.setattr(small, "EVALUATED", 2)
    monkeypatch.setattr(small, "_evaluate", kept)
    small.train(regime, runs)
    for i in (0, 3, 5, 6):
        theta, _ = plain_loop(regime, runs[i])
        moved = (theta - small.speaker(regime.world)[0]).abs().max()
        assert moved > 2e-3
        # Adam's first steps divide small gradients by themselves: rounding of a few weights is amplified.
        apart = (trained[-1][i] - theta).abs()
        assert apart.quantile(0.99) < 1e-5 and apart.max() < 0.2 * moved, (i, apart.max(), moved)


def test_each_runs_gradient_is_that_of_its_own_loss():
    world = World()
    runs = [Run(o, 1e-3, s) for o in (ImportanceSampling(), GSPO(), CPPO(), DPPO(0.15)) for s in (0, 1)]
    generator = torch.Generator().manual_seed(3)
    shape = (len(runs), ROWS, LENGTH)
    logp = -torch.rand(shape, generator=generator).double().mul(3).requires_grad_()
    mu, advantage = -torch.rand(shape, generator=generator).double().mul(3), torch.randn(shape[:2], generator=generator)
    (batched,) = torch.autograd.grad(small.summed_loss(world, runs, logp, mu, advantage), logp)
    for i, run in enumerate(runs):
        one = logp[i : i + 1].detach().requires_grad_()
        loss = small.summed_loss(world, [run], one, mu[i : i + 1], advantage[i : i + 1])
        torch.testing.assert_close(batched[i : i + 1], torch.autograd.grad(loss, one)[0], rtol=1e-6, atol=1e-9)


def test_problems_and_random_numbers_are_the_seeds_alone():
    runs = [Run(o, r, s) for o, r, s in ((DRPO(0.2), 1e-3, 0), (GSPO(), 2e-3, 0), (GSPO(), 2e-3, 1))]
    prompts, cues, _, uniform = small._problems(World(), runs, 3, 2, 4)
    assert (uniform[0] == uniform[1]).all() and (uniform[0] != uniform[2]).any()
    assert (prompts == small.CUES + cues).all() and (cues.view(3, 2, 4) == cues.view(3, 2, 4)[..., :1]).all()


def test_a_brake_is_drpo_inside_and_dppos_mask_outside():
    pi, mu = torch.rand(2, 500, dtype=torch.float64).clamp(0.01, 0.99)
    advantage = torch.randn(500, dtype=torch.float64)
    tokens = Tokens(pi.log(), mu.log(), advantage, torch.ones(500).bool(), torch.arange(500))
    brake, drpo, dppo = (gradient_weight(o, tokens) for o in (Brake(0.2), DRPO(0.2), DPPO(0.2)))
    outside = Brake(0.2).out_of_region(tokens)
    assert outside.any() and not outside.all()
    torch.testing.assert_close(brake, torch.where(dppo == 0, 0, drpo))
    torch.testing.assert_close(brake, drpo.clamp(min=0))


def test_a_coarse_router_sends_some_tokens_elsewhere():
    world = replace(WORLDS[2])
    theta = models(world, 1)
    prompts, cues, any_cues, uniform = small._problems(world, [Run(DRPO(0.2), 1e-3, 0)], 0, 16, 4)
    fine, coarse = (
        small.answers(world, small.sampler_weights(world, theta, "fp32", router), prompts, cues, any_cues, uniform)
        for router in ("fp32", "bf16")
    )
    assert fine.routes is not None and coarse.routes is not None
    same = fine.text[..., :1] == coarse.text[..., :1]
    assert same.all()
    assert 0 < (fine.routes != coarse.routes).any(-1).float().mean() < 0.9


# The study: what was registered, what was run, and what follows from it.


each_study = pytest.mark.parametrize("study", regions.STUDIES.values(), ids=regions.STUDIES)


@each_study
def test_the_registered_claims_are_of_the_studys_objectives_at_five_percent_together(study: regions.Study):
    plans = study_runs.plans(study.claims)
    assert sum(plan.error_rate for plan in plans.values()) == pytest.approx(0.05)
    named = {name for plan in plans.values() for pair in plan.pairs for name in pair}
    assert named == set(map(study_runs.spec_of, study.objectives))
    assert {plan.seeds[-1] for plan in plans.values()} == {len(study.seeds)}
    assert not set(study.seeds) & set(regions.PILOT)


@each_study
def test_runs_that_are_reported_have_the_rates_that_other_seeds_chose(study: regions.Study):
    rates, cells = regions.rates(study), study_runs.read(study.records)
    assert cells and all(cell.rate == rates[cell.objective] and cell.seed in study.seeds for cell in cells)
    assert {cell.seed for cell in study_runs.read(study.tuning)} == set(regions.PILOT)


def test_no_seed_is_of_two_studies():
    assert not set(regions.FIRST.seeds) & set(regions.MORE.seeds)


@each_study
def test_verdicts_are_current(study: regions.Study):
    current = regions_page.verdicts_file(study).read_text(encoding="utf-8")
    assert current == regions_page.verdicts(study), "python studies/figures.py"


@pytest.mark.slow
def test_scipy_alone_finds_the_same():
    assert set(regions_check.STUDIES) == set(regions.STUDIES)
    assert regions_check.main() == 0


def test_scipy_alone_notices_another_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for path in regions.RESULTS.glob("regions*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    few = {"f": json.loads((tmp_path / "regions_verdicts.json").read_text())["f"]}
    monkeypatch.setattr(regions_check, "RESULTS", tmp_path)
    for verdict, differing in (("undecided", 0), ("above", 1)):
        text = json.dumps(few).replace('"verdict": "undecided"', f'"verdict": "{verdict}"', 1)
        (tmp_path / "regions_verdicts.json").write_text(text)
        assert regions_check.differing("regions") == differing


def test_finished_batches_are_kept_and_not_trained_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    small_regime = Regime(updates=2, steps=16)
    monkeypatch.setattr(regions, "REGIMES", {"tiny": small_regime})
    monkeypatch.setattr(regions, "BATCH", 2)
    monkeypatch.setattr(small, "EVALUATED", 2)
    path = tmp_path / "runs.jsonl"
    cells = [study_runs.StudyRun("tiny", o, 1e-3, 0) for o in ("none", "drpo(0.2)", "gspo(0.0003, 0.0004)")]
    assert regions.train_cells(path, cells[:2], until=math.inf)
    before = path.read_text()
    assert not regions.train_cells(path, cells, until=0)  # no time: nothing begins
    assert path.read_text() == before
    assert regions.train_cells(path, cells, until=math.inf, threads=2)
    assert path.read_text().startswith(before) and set(study_runs.read(path)) == set(cells)
    assert all(0 <= record["end"] <= 1 and len(record["k3"]) == 4 for record in study_runs.read(path).values())
