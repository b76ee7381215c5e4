"""Tokens that tools and environments wrote have no part in a loss, its gradient or its metrics.

Here without the frameworks: what the adapters share, used as TRL, verl and SkyRL use it, and prime-rl's custom loss.
The tests of each framework repeat it with the framework's own loss.

How prime-rl marks turns, read in src/prime_rl/orchestrator/trajectories.py at commit 559b447: a sample is a branch of
the conversation, and its mask is True where the model sampled the token, for the first branch that has it.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from adapters.cases import OF_2026, SEQUENCE, SPECS
from adapters.episodes import LossOf, Padded, episodes, own_loss, require_masks
from adapters.parity import record
from drpo import objectives
from drpo.adapters import behavior_or_policy, figures, reweight, token_loss
from drpo.adapters.prime_rl import drpo_loss
from drpo.reductions import sequence_mean, token_mean
from drpo.spec import parse_spec

EVERY = (*SPECS, SEQUENCE, *(pytest.param(s, marks=pytest.mark.slow) for s in OF_2026))


def shown(spec: str, batch: Padded) -> dict[str, float]:
    objective = parse_spec(spec, objectives.REGISTRY)
    seen = figures(objective, batch.logp, batch.behavior_logp, batch.advantage, batch.keep)
    return {name: value.item() for name, value in seen.items()}


def reweighted(spec: str, batch: Padded) -> tuple[Tensor, dict[str, float]]:
    """As in TRL: its own surrogate, with old := mu and the advantage weighed."""
    objective, logp, keep = parse_spec(spec, objectives.REGISTRY), batch.logp, batch.keep
    advantage = reweight(objective, logp, batch.behavior_logp, batch.advantage[:, 0], keep)
    old = behavior_or_policy(logp, batch.behavior_logp, keep)
    return -(torch.exp(logp - old) * advantage * keep).sum() / keep.sum(), shown(spec, batch)


def reduced(spec: str, batch: Padded) -> tuple[Tensor, dict[str, float]]:
    """As in verl and SkyRL: our loss per token, multiplied by their mask."""
    objective, keep = parse_spec(spec, objectives.REGISTRY), batch.keep
    loss = token_loss(objective, batch.logp, batch.behavior_logp, batch.advantage, keep)
    return (loss * keep).sum() / keep.sum(), shown(spec, batch)


def in_prime_rl(spec: str, batch: Padded) -> tuple[Tensor, dict[str, float]]:
    """Sequence by sequence; prime-rl divides by the number of trained tokens."""
    losses, seen = [], {}
    for i, row in enumerate(batch.logp):
        inputs = SimpleNamespace(
            trainer_logprobs=row,
            inference_logprobs=batch.behavior_logp[i],
            advantages=batch.advantage[i],
            loss_mask=batch.keep[i],
            loss_weights=None,
        )
        result = drpo_loss(inputs, objective=spec)
        losses.append(result.loss)
        seen |= {f"{name} {i}": value.item() for name, value in result.metrics.items()}
    return torch.stack(losses).sum() / batch.keep.sum(), seen


@pytest.mark.parametrize("loss_of", [reweighted, reduced, in_prime_rl])
@pytest.mark.parametrize("spec", EVERY)
def test_tokens_of_tools_have_no_part_in_it(spec: str, loss_of: LossOf):
    worst = require_masks(loss_of, spec, value=loss_of is not reweighted)
    if loss_of is in_prime_rl:
        record("prime-rl (contract), turns", "git 559b447", spec, worst)


def test_a_sequence_is_the_sampled_tokens_of_the_episode():
    """GSPO's ratio, by hand: the mean over what the model sampled, in all turns."""
    batch, spec = episodes(1), "gspo(0.99, 1000)"
    loss, _ = reduced(spec, batch)
    log_ratio = (batch.logp - batch.behavior_logp).double()
    ratios = [log_ratio[i][keep].mean().exp() for i, keep in enumerate(batch.keep)]
    n, a = batch.keep.sum(1), batch.advantage[:, 0]
    wanted = -sum(r * a[i] * n[i] for i, r in enumerate(ratios)) / n.sum()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_our_own_trainer_sees_no_other_tokens():
    """What the comparison rests on, against the objective's plain formula over the sampled tokens."""
    batch = episodes(2)
    pi, mu, a = batch.logp.exp(), batch.behavior_logp.exp(), batch.advantage
    each = -pi / mu * a
    assert own_loss("none", batch, token_mean).item() == pytest.approx(each[batch.keep].mean().item(), abs=1e-6)
    rows = torch.stack([row[keep].mean() for row, keep in zip(each, batch.keep, strict=True)])
    assert own_loss("none", batch, sequence_mean).item() == pytest.approx(rows.mean().item(), abs=1e-6)
