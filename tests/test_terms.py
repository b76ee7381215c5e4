"""The additive terms' expected gradients, by exact enumeration of a vocabulary of seven.

The policy, the reference and the sampler are softmaxes of fixed logits; the expectation over the sampler's token is a
sum, so the comparison has no sampling error. The right-hand sides are written with the softmax's own derivative,
d log pi_y / d z_j = [y = j] - pi_j, and not by automatic differentiation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from drpo.credit import credit_rule
from drpo.credit.advantages import rloo
from drpo.credit.gae import GAE
from drpo.credit.reference_kl import with_reference_kl
from drpo.credit.rules import turn_rewards
from drpo.errors import InputError
from drpo.objectives import ImportanceSampling, total
from drpo.objectives.terms import entropy_bonus, reference_kl, reference_kl_advantage
from drpo.types import Problem, RewardResult, ScoredGroup, Tokens
from support.tiny_world import completion

VOCABULARY = 7
LOGITS, REFERENCE, FAR = torch.randn(
    3, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
).unbind()
SAMPLERS = {"on-policy": LOGITS, "off-policy": LOGITS + 0.8 * FAR, "far off-policy": 2 * FAR}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def slope(loss: Tensor, logits: Tensor) -> Tensor:
    (out,) = torch.autograd.grad(loss, logits)
    return out


def forward_kl_slope() -> Tensor:
    """d KL(pi || reference) / d z_j = pi_j (log(pi_j / ref_j) - KL)."""
    log_ratio = LOGITS.log_softmax(0) - REFERENCE.log_softmax(0)
    pi = LOGITS.softmax(0)
    return pi * (log_ratio - (pi * log_ratio).sum())


def reverse_kl_slope() -> Tensor:
    """d KL(reference || pi) / d z_j = pi_j - ref_j."""
    return LOGITS.softmax(0) - REFERENCE.softmax(0)


def expected_kl_term_slope(sampler: Tensor, estimator: str) -> Tensor:
    """The mean over the sampler's tokens of the gradient of `reference_kl`."""
    z = LOGITS.clone().requires_grad_()
    term = reference_kl(z.log_softmax(0), REFERENCE.log_softmax(0), sampler.log_softmax(0), estimator)
    return slope((sampler.softmax(0) * term).sum(), z)


def test_terms_refuse_by_name_and_take_a_coefficient_of_0() -> None:
    for refused in (lambda c: reference_kl_advantage(LOGITS, REFERENCE, c), lambda c: entropy_bonus(LOGITS, c)):
        with pytest.raises(InputError, match=r"^coefficient=-0.1 must be"):
            refused(-0.1)
        assert bool((refused(0.0) == 0).all())
    with pytest.raises(InputError, match=r"^estimator='k9' must be"):
        reference_kl(LOGITS, REFERENCE, FAR, "k9")
    assert torch.equal(reference_kl(LOGITS, REFERENCE, FAR), reference_kl(LOGITS, REFERENCE, FAR, "k2"))


def test_the_weight_of_the_kl_ends_at_a_ratio_of_e_to_the_20() -> None:
    logp, reference = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
    for far in (-21.0, -800.0):
        assert reference_kl(logp, reference, logp.new_tensor([far])).item() == pytest.approx(math.exp(20) / 2)


@each_sampler
def test_k2_in_the_loss_descends_the_kl_to_the_reference(sampler: Tensor) -> None:
    """For any sampler, because of the stop-gradient ratio in front."""
    assert torch.allclose(expected_kl_term_slope(sampler, "k2"), forward_kl_slope(), rtol=0, atol=1e-14)


@each_sampler
def test_k3_in_the_loss_descends_the_other_kl(sampler: Tensor) -> None:
    """The documented bias: its gradient is KL(reference || pi)'s, and is not KL(pi || reference)'s."""
    got = expected_kl_term_slope(sampler, "k3")
    assert torch.allclose(got, reverse_kl_slope(), rtol=0, atol=1e-14)
    assert (got - forward_kl_slope()).abs().max() > 0.1


def two_token_policies() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """200 policies and references over texts of two of 5 tokens: logits of the first, and of the second after each."""
    generator = torch.Generator().manual_seed(0)
    first, first_reference = torch.randn(2, 200, 5, dtype=torch.float64, generator=generator).unbind()
    second, second_reference = torch.randn(2, 200, 5, 5, dtype=torch.float64, generator=generator).unbind()
    return first.requires_grad_(), second.requires_grad_(), first_reference, second_reference


def test_the_kl_is_of_tokens_in_their_contexts_and_not_of_texts() -> None:
    """The documented figures: what the first token's gradient does not see of the second's KL, by enumeration."""
    first, second, first_reference, second_reference = two_token_policies()
    a, b = first.log_softmax(-1), second.log_softmax(-1)
    ref_a, ref_b = first_reference.log_softmax(-1), second_reference.log_softmax(-1)
    chance = (a[..., None] + b).exp()  # [200, 5, 5], of each text
    text = torch.autograd.grad(
        (chance * (a[..., None] + b - ref_a[..., None] - ref_b)).sum(), (first, second), retain_graph=True
    )
    terms = reference_kl(a, ref_a, a.detach())[..., None] + reference_kl(b, ref_b, b.detach())  # on-policy
    found = torch.autograd.grad((chance.detach() * terms).sum(), (first, second))
    assert torch.allclose(found[1], text[1], rtol=0, atol=1e-14)  # nothing follows the last token
    exact, per_context = (torch.cat([x.flatten(1) for x in parts], 1) for parts in (text, found))
    off = per_context - exact
    assert float((off.norm(dim=1) / exact.norm(dim=1)).mean()) == pytest.approx(0.33, abs=0.02)
    assert float((off[:, :5].norm(dim=1) / exact[:, :5].norm(dim=1)).mean()) == pytest.approx(0.46, abs=0.03)


@each_sampler
def test_k1_in_the_reward_descends_the_kl_to_the_reference(sampler: Tensor) -> None:
    """Added to the advantage of the plain surrogate, whose importance ratio makes it exact off-policy too."""
    z = LOGITS.clone().requires_grad_()
    logp = z.log_softmax(0)
    added = reference_kl_advantage(logp, REFERENCE.log_softmax(0), 0.3)
    assert not added.requires_grad
    index = torch.arange(VOCABULARY)
    tokens = Tokens(logp, sampler.log_softmax(0), added, torch.ones(VOCABULARY).bool(), index)
    got = slope(total(ImportanceSampling(), tokens, sampler.softmax(0)), z)
    assert torch.allclose(got, 0.3 * forward_kl_slope(), rtol=0, atol=1e-14)


KL, TEXTS = 0.3, list(product(range(3), repeat=2))


def enumerated() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A policy and a reference over texts of two of three tokens: their logits, log-probabilities, and the rewards."""
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator).unbind()
    rewards = torch.randn(len(TEXTS), dtype=torch.float64, generator=generator)
    logits.requires_grad_()

    def logp(table: Tensor) -> Tensor:
        """[9, 2] of each text's tokens: row 0 of the table for the first, row 1 + a for the second after a."""
        rows = table.log_softmax(-1)
        return torch.stack([torch.stack([rows[0, a], rows[1 + a, b]]) for a, b in TEXTS])

    return logits, logp(logits), logp(reference), rewards


def group_of(texts: Sequence[int], logp: Tensor, rewards: Tensor, turns: tuple[int, ...]) -> ScoredGroup:
    made = [completion(TEXTS[x], sample=i) for i, x in enumerate(texts)]
    sequences = [replace(e.sequence, behavior_logp=logp[x].detach()) for e, x in zip(made, texts, strict=True)]
    episodes = tuple(replace(e, sequences=(s,), turns=turns) for e, s in zip(made, sequences, strict=True))
    results = tuple(RewardResult(float(rewards[x])) for x in texts)
    return ScoredGroup(Problem.of_text("p", "?", ""), episodes, results)


def expected_slope(advantage: Callable[[tuple[int, ...]], Sequence[Tensor]], n_texts: int) -> Tensor:
    """The mean, over all groups of so many texts, of the policy gradient with the advantages of their tokens."""
    logits, logp, _, _ = enumerated()
    loss = torch.zeros((), dtype=torch.float64)
    for texts in product(range(len(TEXTS)), repeat=n_texts):
        chance = logp[list(texts)].sum().exp().detach()
        loss = loss + chance * sum((a * logp[x]).sum() for a, x in zip(advantage(texts), texts, strict=True)) / n_texts
    return slope(loss, logits)


def exact_slope(kl: float) -> Tensor:
    """Of E[R] - kl KL(pi || ref), over whole texts."""
    logits, logp, reference_logp, rewards = enumerated()
    gain = rewards - kl * (logp.sum(1) - reference_logp.sum(1))
    return slope((logp.sum(1).exp() * gain).sum(), logits)


@pytest.mark.parametrize("turns", [(2,), (1, 1)])
@pytest.mark.parametrize("with_critic", [False, True])
def test_the_kl_in_the_reward_is_of_whole_texts(turns: tuple[int, ...], with_critic: bool) -> None:
    """The expected policy gradient is that of E[R] - KL of texts, whatever a critic thinks of the contexts."""
    _, logp, reference_logp, rewards = enumerated()

    def advantage(texts: tuple[int, ...]) -> Sequence[Tensor]:
        groups = [group_of(texts, logp, rewards, turns)]
        groups = with_reference_kl(groups, [reference_logp[x] for x in texts], KL)
        values = [torch.tensor([0.5, TEXTS[x][0] - 1.0]) for x in texts]
        rule = credit_rule(rloo, GAE(lam=1.0, whiten=False) if with_critic else None)
        return [credit.advantage for credit in rule(groups, values)]

    found = expected_slope(advantage, 1 if with_critic else 2)
    torch.testing.assert_close(found, exact_slope(KL), rtol=1e-5, atol=1e-6)
    logits, logp, _, _ = enumerated()  # what the loss term does in its place
    chance = logp.sum(1).exp().detach()
    in_loss = slope((chance * reference_kl(logp, reference_logp, logp.detach()).sum(1)).sum(), logits)
    per_context = exact_slope(0.0) - KL * in_loss
    assert (per_context - exact_slope(KL)).norm() > 0.05 * exact_slope(KL).norm()


def test_the_kl_in_the_reward_keeps_the_total_and_says_its_part() -> None:
    _, logp, reference_logp, rewards = enumerated()
    group = group_of([3, 4], logp, rewards, (2,))
    group = replace(group, results=(RewardResult(1.0, {"right": 1.0}, (0.5,)), RewardResult(0.0)))
    (found,) = with_reference_kl([group], [reference_logp[3], reference_logp[4]], KL)
    k1 = (logp - reference_logp)[3:5].detach()
    assert [r.total for r in found.results] == [1.0, 0.0] and found.episodes == group.episodes
    assert found.results[0].parts == {"right": 1.0, "reference_kl": pytest.approx(-KL * float(k1[0].sum()))}
    assert found.results[0].turns == (0.5,) and found.rewards.tolist() == [1.5, 0.0]
    assert found.results[0].penalties == tuple(pytest.approx(-KL * float(k)) for k in k1[0])
    assert torch.cat(turn_rewards(found.results[0], [2])).tolist() == [
        pytest.approx(-KL * float(k1[0, 0])), pytest.approx(1.5 - KL * float(k1[0, 1]))
    ]  # fmt: skip


def test_reference_kl_values() -> None:
    """r (l - ref)^2 / 2 and r (e^(ref - l) - 1 - (ref - l)); 0 with no slope where pi is the reference."""
    logp, reference_logp, behavior_logp = (torch.tensor([x, -1.0]).double() for x in (-1.0, -2.0, -1.5))
    ratio = torch.tensor([0.5, 0.0]).double().exp()
    for estimator, want in (("k2", 0.5), ("k3", 0.36787944117144233)):
        term = reference_kl(logp.requires_grad_(), reference_logp, behavior_logp, estimator)
        assert torch.allclose(term, ratio * torch.tensor([want, 0.0]).double())
        (got,) = torch.autograd.grad(term.sum(), logp)
        assert got[0] > 0
        assert got[1] == 0


def test_reference_kl_gives_no_gradient_to_the_reference_or_the_sampler() -> None:
    logp, reference_logp, behavior_logp = (torch.tensor([x]).requires_grad_() for x in (-1.0, -2.0, -1.5))
    for estimator in ("k2", "k3"):
        term = reference_kl(logp, reference_logp.detach(), behavior_logp, estimator)
        assert torch.autograd.grad(term.sum(), behavior_logp, allow_unused=True)[0] is None


def test_entropy_bonus_climbs_the_entropy() -> None:
    """d H / d z_j = -pi_j (log pi_j + H), at every context exactly."""
    z = LOGITS.clone().requires_grad_()
    logp = z.log_softmax(0)
    entropy = -(logp.exp() * logp).sum()
    want = -LOGITS.softmax(0) * (LOGITS.log_softmax(0) + entropy.detach())
    got = slope(entropy_bonus(entropy[None], 0.25).sum(), z)
    assert torch.allclose(got, -0.25 * want, rtol=0, atol=1e-14)
    assert entropy_bonus(torch.tensor([2.0, 0.0]), 0.25).tolist() == [-0.5, 0.0]


def test_terms_refuse_wrong_parameters_by_name() -> None:
    one = torch.zeros(1)
    with pytest.raises(InputError, match="estimator"):
        reference_kl(one, one, one, "k1")
    for coefficient in (-1.0, float("nan")):
        with pytest.raises(InputError, match="coefficient"):
            reference_kl_advantage(one, one, coefficient)
        with pytest.raises(InputError, match="coefficient"):
            entropy_bonus(one, coefficient)
