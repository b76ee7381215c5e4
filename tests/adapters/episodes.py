"""Episodes with tokens that tools wrote: as frameworks pad them, and as our own trainer packs them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drpo import objectives
from drpo.batch import BatchConfig, make_batches
from drpo.objectives import total
from drpo.reductions import Reduction, token_mean
from drpo.spec import parse_spec
from drpo.types import Credit, Episode, Problem, RewardResult, Sampling, ScoredGroup, TokenSequence

LENGTHS = ((3, 4, 2, 1, 3), (5,), (1, 6, 4), (2, 2, 1, 3, 2))
"""Of each episode: sampled tokens, a tool's, sampled ones, a tool's, ..."""
VOCABULARY = 5


@dataclass(frozen=True)
class Padded:
    """B episodes without their prompts, padded on the right to T tokens.

    Args:
        logits: [B, T, V]; those that the model computes for each token.
        target: [B, T] int64; the tokens.
        behavior_logp: [B, T] nats; 0 where nothing was sampled, as TRL, verl, SkyRL and verifiers write it there.
        advantage: [B, T]; the same for all tokens of an episode.
        keep: [B, T] bool; False at a tool's tokens and in padding.
        inside: [B, T] bool; False in padding.
    """

    logits: Tensor
    target: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    keep: Tensor
    inside: Tensor

    @property
    def logp(self) -> Tensor:
        """[B, T] nats; the policy's, with a gradient where `logits` has one."""
        return self.logits.log_softmax(-1).gather(2, self.target.unsqueeze(2)).squeeze(2)


LossOf = Callable[[str, Padded], tuple[Tensor, dict[str, float]]]
"""An objective's spec and a batch -> a framework's loss with its token mean, and the metrics that it logs."""


def episodes(seed: int = 0) -> Padded:
    """Four episodes, one of them a single turn, whose sampler was off by enough to leave every region."""
    draw = torch.Generator().manual_seed(seed)
    sampled = [[turn % 2 == 0] * n for row in LENGTHS for turn, n in enumerate(row)]
    rows = iter(sampled)
    keep = [torch.tensor([flag for _ in row for flag in next(rows)]) for row in LENGTHS]
    kept = torch.nn.utils.rnn.pad_sequence(keep, batch_first=True)
    inside = torch.nn.utils.rnn.pad_sequence([torch.ones_like(k) for k in keep], batch_first=True)
    logits = torch.randn(*kept.shape, VOCABULARY, generator=draw)
    target = torch.randint(VOCABULARY, kept.shape, generator=draw)
    blank = Padded(logits, target, torch.zeros(kept.shape), torch.zeros(kept.shape), kept, inside)
    noise = 0.5 * torch.randn(kept.shape, generator=draw)
    mu = torch.where(kept, (blank.logp + noise).clamp(max=-0.01), 0.0)
    advantage = torch.tensor([1.0, -0.7, 0.4, -1.2]).unsqueeze(1).expand(kept.shape)
    return replace(blank, behavior_logp=mu, advantage=advantage)


def spoilt(batch: Padded, junk: float) -> Padded:
    """The same, but at the tokens of tools and in padding other logits, targets, scores and advantages."""
    keep = batch.keep
    return replace(
        batch,
        logits=torch.where(keep.unsqueeze(2), batch.logits, -3 * batch.logits.roll(1, 2)),
        target=torch.where(keep, batch.target, (batch.target + 1) % VOCABULARY),
        behavior_logp=torch.where(keep, batch.behavior_logp, junk),
        advantage=torch.where(keep, batch.advantage, 7.0),
    )


def own_loss(spec: str, batch: Padded, reduction: Reduction = token_mean) -> Tensor:
    """What our own trainer makes of the episodes: a batch of the sampled tokens alone, in micro-batches of two."""
    sequences = [_sequence(batch, row) for row in range(len(batch.target))]
    group = ScoredGroup(
        Problem.of_text("p", "", ""),
        tuple(Episode("p", i, (), "", "", "stop", Sampling(), (s.n_sampled,), (s,)) for i, s in enumerate(sequences)),
        tuple(RewardResult(0.0) for _ in sequences),
    )
    credits = [Credit(s, batch.advantage[i][batch.keep[i]]) for i, s in enumerate(sequences)]
    config = BatchConfig(updates=1, reduction=reduction, micro_batch_tokens=24, skip_zero_advantage=True)
    (whole,) = make_batches([group], credits, config)
    assert whole.n_tokens == int(batch.keep.sum()) and len(whole.micro_batches) > 1
    objective = parse_spec(spec, objectives.REGISTRY)
    losses = []
    for micro in whole.micro_batches:
        logp = torch.cat([batch.logp[i][batch.keep[i]] for i in micro.row.unique_consecutive().tolist()])
        losses.append(total(objective, micro.tokens(logp), micro.weight))
    return torch.stack(losses).sum()


def _sequence(batch: Padded, row: int) -> TokenSequence:
    n = int(batch.inside[row].sum())
    sampled = batch.keep[row, :n]
    mu = batch.behavior_logp[row, :n][sampled]
    version = torch.zeros(len(mu), dtype=torch.int64)
    return TokenSequence(torch.tensor([1, row]), batch.target[row, :n], sampled, mu, version)


def require_masks(
    loss_of: LossOf, spec: str, *, value: bool = True, reduction: Reduction = token_mean, seed: int = 0
) -> float:
    """Fail unless a framework's loss leaves out what tools wrote: in its value, its gradient and its metrics.

    Args:
        loss_of: the framework with our adapter.
        spec: of the objective.
        value: the loss is the objective's own, not only its gradient.
        reduction: ours that averages as `loss_of` does.
        seed: of the episodes.

    Returns:
        The largest error of the logits' gradient against our own trainer's in float64.
    """
    batch = episodes(seed)
    loss, slope, shown = _at(loss_of, spec, batch)
    others = ~batch.keep
    assert (slope[others] == 0).all() and (slope[batch.keep] != 0).any()
    for junk in (0.0, -9.0):
        found, its_slope, its_shown = _at(loss_of, spec, spoilt(batch, junk))
        assert torch.equal(found, loss) and torch.equal(its_slope, slope) and its_shown == shown, junk
    columns = {name: getattr(batch, name).double() for name in ("logits", "behavior_logp", "advantage")}
    exact = replace(batch, **columns)
    wanted, its_slope, _ = _at(lambda name, rows: (own_loss(name, rows, reduction), {}), spec, exact)
    if value:
        assert abs(loss.item() - wanted.item()) < 1e-6
    error = (slope - its_slope).abs().max().item()
    assert error < 1e-6
    return error


def _at(loss_of: LossOf, spec: str, batch: Padded) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The loss, its gradient in the logits, and the metrics."""
    logits = batch.logits.clone().requires_grad_()
    loss, shown = loss_of(spec, replace(batch, logits=logits))
    (slope,) = torch.autograd.grad(loss, logits)
    return loss.detach(), slope, shown
