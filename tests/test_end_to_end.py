"""Whole runs against plain float64 PyTorch, written out here from the papers' formulas.

Only the rollouts come from the run: tokens, their probabilities, rewards. All else is computed again: advantages,
losses, additive terms, reductions, clipping, learning rates and AdamW.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.model import loading
from drpo.objectives import DRPO, GSPO, PPOClip
from drpo.reductions import horizon, sequence_mean, token_mean
from drpo.rewards import in_process
from drpo.train import optim
from drpo.train.config import Run
from drpo.train.loop import train
from drpo.train.optim import Constant, Cosine, Linear
from drpo.train.records import CHECKPOINTS, METRICS, ROLLOUTS, read_records
from drpo.train.setup import build
from drpo.train.stored import OPTIMIZER, WEIGHTS, latest
from drpo.types import Problem, TokenLoss, Tokens
from support.runs import CopiesAt
from support.tiny_world import doubled
from support.worlds import sampling, tiny_run

STEPS, UPDATES, PROMPTS_PER_UPDATE, HORIZON = 3, 3, 2, 6
PEAK, DECAY, BETAS, EPSILON = 0.01, 0.5, (0.7, 0.95), 1e-8


@in_process
def parity(problem: Problem, text: str) -> float:
    """Half of all texts are right, whatever they say."""
    return float(sum(map(ord, text)) % 2)


def uneven() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The tiny model with norms whose weights are not 1, so that decaying them shows."""
    model, tokenizer = loading.tiny()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
    return model, tokenizer


# Losses per token of one completion: l [n] and m [n] the policy's and the sampler's log-probabilities, a its advantage.


def drpo(l: Tensor, m: Tensor, a: float) -> Tensor:
    r = torch.exp(l - m)
    return -r * a + abs(a) * m.exp() * (r - 1) ** 2 / (2 * 0.1)


def ppo(l: Tensor, m: Tensor, a: float) -> Tensor:
    r = torch.exp(l - m)
    return -torch.minimum(r * a, r.clamp(0.9, 1.15) * a)


def gspo(l: Tensor, m: Tensor, a: float) -> Tensor:
    s = torch.exp((l - m).mean()).detach() * torch.exp(l - l.detach())
    return -torch.minimum(s * a, s.clamp(0.97, 1.03) * a)


@dataclass(frozen=True)
class Case:
    """A run's settings, and the same by hand.

    Args:
        changes: to the configuration.
        temperature: of sampling and training.
        max_norm: the gradient's; it binds in some updates.
        loss: of each token.
        weight: tokens of the update, completions of the update, length of the completion -> weight of a token's loss.
        decay: share of the updates after the warm-up -> share of the peak learning rate.
        kl: coefficient of the KL to the initial model.
        entropy: coefficient of the entropy bonus.
    """

    changes: dict[str, Any]
    temperature: float
    max_norm: float
    loss: Callable[[Tensor, Tensor, float], Tensor]
    weight: Callable[[int, int, int], float]
    decay: Callable[[float], float]
    kl: float = 0.2
    entropy: float = 0.05


CASES = {
    "drpo": Case(
        {"objective": DRPO(0.1), "reduction": horizon(HORIZON), "schedule": Linear(warmup=1)},
        0.7, 3.0, drpo, lambda tokens, rows, length: 1 / (rows * HORIZON), lambda x: 1 - x,
    ),
    "ppo": Case(
        {"objective": PPOClip(0.1, 0.15), "reduction": token_mean, "schedule": Cosine(warmup=1)},
        1.0, 1.6, ppo, lambda tokens, rows, length: 1 / tokens, lambda x: (1 + math.cos(math.pi * x)) / 2,
    ),
    "gspo": Case(
        {"objective": GSPO(0.03, 0.03), "reduction": sequence_mean, "schedule": Linear(warmup=1)},
        1.3, 1.3, gspo, lambda tokens, rows, length: 1 / (rows * length), lambda x: 1 - x,
    ),
    "drpo without terms": Case(
        {"objective": DRPO(0.1), "reduction": token_mean, "schedule": Constant(warmup=1)},
        1.0, 2.0, drpo, lambda tokens, rows, length: 1 / tokens, lambda x: 1, kl=0, entropy=0,
    ),
}  # fmt: skip


def distribution(model: PreTrainedModel, record: dict[str, Any], temperature: float) -> Tensor:
    """[n, V] log-probabilities at each token of a completion, which goes through the model by itself."""
    ids = torch.tensor(record["prompt_ids"] + record["token_ids"])
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(record["prompt_ids"]) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1)


def of_tokens(distribution: Tensor, record: dict[str, Any]) -> Tensor:
    return distribution.gather(-1, torch.tensor(record["token_ids"])[:, None])[:, 0]


def update_loss(
    case: Case, model: PreTrainedModel, reference: PreTrainedModel, records: list[dict[str, Any]]
) -> tuple[Tensor, float]:
    """Of one update: advantages within a problem, all three terms, the reduction; and the mean KL to the reference."""
    n_tokens = sum(len(r["token_ids"]) for r in records)
    loss, total_kl = torch.zeros((), dtype=torch.float64), 0.0
    for record in records:
        group = [r["reward"] for r in records if r["problem"] == record["problem"]]
        advantage = record["reward"] - sum(group) / len(group)
        everything = distribution(model, record, case.temperature)
        l, m = of_tokens(everything, record), torch.tensor(record["behavior_logp"], dtype=torch.float64)
        with torch.no_grad():
            l_reference = of_tokens(distribution(reference, record, case.temperature), record)
        kl = torch.exp(l - m).detach() * (l - l_reference) ** 2 / 2
        total_kl += float(kl.detach().sum())
        entropy = -(everything.exp() * everything).sum(-1)
        weight = case.weight(n_tokens, len(records), len(l))
        loss = loss + weight * (case.loss(l, m, advantage) + case.kl * kl - case.entropy * entropy).sum()
    return loss, total_kl / n_tokens


class AdamW:
    """Loshchilov and Hutter's Algorithm 2, with the decay on matrices only."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.t = 0
        self.state = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], rate: float) -> None:
        self.t += 1
        first, second = BETAS
        for (p, m, v), g in zip(self.state, gradients, strict=True):
            m.copy_(first * m + (1 - first) * g)
            v.copy_(second * v + (1 - second) * g * g)
            m_hat, v_hat = m / (1 - first**self.t), v / (1 - second**self.t)
            p -= rate * (m_hat / (v_hat.sqrt() + EPSILON) + (DECAY * p if p.ndim > 1 else 0))


def learning_rate(case: Case, index: int) -> float:
    """One step of warm-up; then down towards 0, which one update more would reach."""
    if index < UPDATES:
        return PEAK * (index + 1) / UPDATES
    return PEAK * case.decay((index - UPDATES) / (STEPS * UPDATES - UPDATES))


def by_hand(case: Case, records: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """The trained weights, and before each update the gradient's norm and the mean KL to the reference."""
    model, reference = doubled(uneven()[0]), doubled(uneven()[0])
    parameters = dict(model.named_parameters())
    optimizer = AdamW(list(parameters.values()))
    norms: list[float] = []
    kls: list[float] = []
    for step in range(STEPS):
        of_step = [r for r in records if r["step"] == step + 1]
        problems = list(dict.fromkeys(r["problem"] for r in of_step))
        for record in of_step:  # sampled by the policy as it stands, at the temperature that is trained at
            with torch.no_grad():
                mu = of_tokens(distribution(model, record, case.temperature), record)
            torch.testing.assert_close(torch.tensor(record["behavior_logp"]).double(), mu, rtol=0, atol=1e-3)
        for update in range(UPDATES):
            own = problems[PROMPTS_PER_UPDATE * update :][:PROMPTS_PER_UPDATE]
            loss, kl = update_loss(case, model, reference, [r for r in of_step if r["problem"] in own])
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
            clipped = tuple(g * min(1.0, case.max_norm / norm) for g in gradients)
            optimizer.step(clipped, learning_rate(case, len(norms)))
            norms.append(norm)
            kls.append(kl)
    return {name: p.detach() for name, p in parameters.items()}, norms, kls


def settings(case: Case) -> Run:
    return tiny_run(
        model="test_end_to_end:uneven", steps=STEPS, updates=UPDATES, prompts=UPDATES * PROMPTS_PER_UPDATE,
        sampling=sampling(samples=3, max_new_tokens=HORIZON, temperature=case.temperature), micro_batch_tokens=24,
        optimizer=optim.AdamW(PEAK, BETAS, DECAY), max_grad_norm=case.max_norm, reference_kl=case.kl,
        entropy_bonus=case.entropy, reward=parity, eval_problems=0, **case.changes,
    )  # fmt: skip


def length(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float((t**2).sum()) for t in tensors))


@pytest.mark.parametrize("name", ["drpo", "ppo", *(pytest.param(n, marks=pytest.mark.slow) for n in [*CASES][2:])])
def test_a_run_is_what_the_formulas_say(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    run = settings(case)
    components = build(run)
    train(run, tmp_path, components=components, keep_model=False)
    wanted, norms, kls = by_hand(case, read_records(tmp_path / ROLLOUTS))
    updates = [u for m in read_records(tmp_path / METRICS) for u in m["updates"]]
    assert [u["grad_norm"] for u in updates] == pytest.approx(norms, rel=1e-4)
    if case.kl:
        assert [u["reference_kl"] for u in updates] == pytest.approx(kls, rel=1e-3, abs=1e-9)
    assert 0 < sum(norm > case.max_norm for norm in norms) < len(norms), norms
    start, found = dict(uneven()[0].named_parameters()), components.policy.trainable()
    assert found.keys() == wanted.keys()
    error = length([found[n].detach().double() - w for n, w in wanted.items()])
    change = length([w - start[n].detach().double() for n, w in wanted.items()])
    assert error <= 1e-4 * change
    for n, w in wanted.items():  # of each tensor too: the norms are few
        assert length([found[n].detach().double() - w]) <= 1e-3 * length([w - start[n].detach().double()]), n


@dataclass(frozen=True)
class DropsTokens:
    """A user's objective that draws from the global generator: half of the tokens count nothing."""

    tokenwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        ratio = (tokens.logp - tokens.behavior_logp).exp()
        return TokenLoss(-ratio * tokens.advantage * (torch.rand(len(ratio)) < 0.5))


def test_a_resumed_run_draws_the_random_numbers_that_it_would_have_drawn(tmp_path: Path) -> None:
    run = tiny_run(objective=DropsTokens(), steps=3, checkpoint_every=1, eval_problems=0, optimizer=optim.AdamW(1e-2))
    train(run, tmp_path / "whole", CopiesAt(2, tmp_path / "whole", tmp_path / "killed"))
    assert latest(tmp_path / "killed" / CHECKPOINTS).name == "step-000001"
    torch.manual_seed(0)
    train(run, tmp_path / "killed")
    whole, resumed = (latest(tmp_path / name / CHECKPOINTS) for name in ("whole", "killed"))
    for file in (WEIGHTS, OPTIMIZER):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
