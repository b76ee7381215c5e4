"""A small language, transformers that speak it, and a trainer of many runs side by side as one batched model.

The language is that of `tail_language`, with longer answers and a smaller vocabulary: common and rare words in turn,
and a quarter of the words follow the class that the cue names. The reward of an answer is the share of its words that
are of that class and of the kind that their place asks for. A world may be sharper (fewer words carry the mass), may
have a turn (the cue is hidden; the first word asks for it or guesses, and the environment answers with the true cue or
with any), and its model may be a mixture of experts.

Shapes: M runs side by side, B answers of each, L words of an answer, V words of the vocabulary, P weights of a model.
Runs share nothing: a run in a batch is the run by itself, to rounding (tests/test_regions.py). The objectives are
`drpo.objectives`, called on the batched log-probabilities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod, sqrt

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding, rms_norm, scaled_dot_product_attention

from drpo.model.precision import DTYPES, GRIDS
from drpo.model.quantize import to_grid
from drpo.objectives import Objective, Tokens, total
from drpo.reductions import Horizon
from drpo.seeds import derive

CLASSES, COMMON, RARE = 8, 24, 93
QUESTION, CALL, GUESS, CUES = 0, 1, 2, 3
FIRST_COMMON = CUES + CLASSES
FIRST_RARE = FIRST_COMMON + COMMON
VOCABULARY = FIRST_RARE + RARE
LENGTH = 64
"""Words of an answer; it ends by length."""
HEED = 0.25
"""The share of words that follow the cue before training."""
WIDTH, HIDDEN = 16, 32
ACTIVE = 2
"""Experts that a token is sent to."""
GROUP, GROUPS = 4, 2
"""Answers to a prompt, and prompts of an update."""
ROWS = GROUP * GROUPS
EVALUATED = 32
"""Answers of an evaluation."""

_WORDS = torch.arange(VOCABULARY)
KIND = torch.where(_WORDS >= FIRST_RARE, 1, torch.where(_WORDS >= FIRST_COMMON, 0, 2))
"""0 for common words, 1 for rare ones, 2 for all others."""
CLASS = torch.where(_WORDS >= FIRST_RARE, _WORDS - FIRST_RARE, _WORDS - FIRST_COMMON) % CLASSES


@dataclass(frozen=True)
class World:
    """A language and the size of its model.

    Args:
        sharp: the mass is on few words, so that the policy is peaked from the start.
        turn: the first word decides what the environment says; the environment's word is masked.
        experts: 1, or the experts of a mixture of which each token uses `ACTIVE`.
    """

    sharp: bool = False
    turn: bool = False
    experts: int = 1

    @property
    def first(self) -> int:
        """The first place that the reward counts."""
        return 2 if self.turn else 0

    @property
    def kept(self) -> Tensor:
        """[L] bool: False where the environment speaks."""
        return torch.arange(LENGTH) != 1 if self.turn else torch.ones(LENGTH, dtype=torch.bool)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight of the model."""
        hidden = HIDDEN if self.experts == 1 else self.experts * HIDDEN // ACTIVE
        return {
            "embed": (VOCABULARY, WIDTH),
            "place": (LENGTH, WIDTH),
            "qkv": (WIDTH, 3 * WIDTH),
            "out": (WIDTH, WIDTH),
            "up": (WIDTH, hidden),
            "down": (hidden, WIDTH),
            "head": (WIDTH, VOCABULARY),
            **({"router": (WIDTH, self.experts)} if self.experts > 1 else {}),
        }

    def words(self, cues: Tensor) -> Tensor:
        """Return the language's distributions [len(cues), 2, V] at places of common and of rare words."""
        rank = torch.where(KIND == 1, _WORDS - FIRST_RARE, _WORDS - FIRST_COMMON).clamp(min=0)
        mass = 1 / (rank + (1 if self.sharp else 10)) ** (1.5 if self.sharp else 1.0)
        any_class = torch.stack([mass * (kind == KIND) for kind in (0, 1)])
        of_class = any_class * (cues[:, None, None] == CLASS)
        return (1 - HEED) * _normalised(any_class) + HEED * _normalised(of_class)

    def texts(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw prompts [1, n] and texts [1, n, L] of the language."""
        cues = torch.randint(CLASSES, (n,), generator=generator)
        text = torch.empty(n, LENGTH, dtype=torch.long)
        p = self.words(cues)
        for kind in (0, 1):
            text[:, kind::2] = torch.multinomial(p[:, kind], LENGTH // 2, True, generator=generator)
        if not self.turn:
            return (CUES + cues)[None], text[None]
        calls = torch.rand(n, generator=generator) < 0.3  # the environment's word is the cue that the text follows
        text[:, 0], text[:, 1] = torch.where(calls, CALL, GUESS), CUES + cues
        return torch.full((1, n), QUESTION), text[None]

    def reward(self, text: Tensor, cues: Tensor) -> Tensor:
        """Return [M, B] the share of counted words that are of the class and of their place's kind.

        Args:
            text: [M, B, L].
            cues: [M, B] in [0, CLASSES), the classes that are asked for.
        """
        right = (CLASS[text] == cues[..., None]) & (KIND[text] == torch.arange(LENGTH) % 2)
        return right[..., self.first :].float().mean(-1)


def _normalised(mass: Tensor) -> Tensor:
    return mass / mass.sum(-1, keepdim=True)


# The model: one layer of attention and one of (mixed) experts, before the output head.


def unpack(world: World, theta: Tensor) -> dict[str, Tensor]:
    """Return the weights of M models by name, [M, ...], as views of theta [M, P]."""
    parts = theta.split([prod(shape) for shape in world.shapes.values()], dim=1)
    return {name: part.view(-1, *shape) for (name, shape), part in zip(world.shapes.items(), parts, strict=True)}


def _embedded(weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Return [M, ..., WIDTH] for tokens [M, ...] of M models."""
    table = weights["embed"]
    offset = torch.arange(len(table)).view(-1, *[1] * (tokens.ndim - 1)) * VOCABULARY
    return embedding(tokens + offset, table.reshape(-1, WIDTH))


def _normed(x: Tensor) -> Tensor:
    return rms_norm(x, (WIDTH,))


def _split(x: Tensor, m: int, b: int) -> tuple[Tensor, ...]:
    """Return queries, keys and values [M B, T, WIDTH] of x [M, B T, 3 WIDTH]; the one head has all of them."""
    parts: tuple[Tensor, ...] = x.view(m * b, -1, 3 * WIDTH).split(WIDTH, -1)
    return parts


def _experts(
    world: World, weights: Mapping[str, Tensor], x: Tensor, routes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the expert layer of x [M, N, WIDTH], and the routes [M, N, experts] bool that were taken.

    `coarse` among the weights is the sampler's router: its scores alone are rounded to bf16.
    """
    hidden = torch.bmm(_normed(x), weights["up"]).relu()
    if world.experts > 1:
        scores = torch.bmm(_normed(x), weights["router"])
        if "coarse" in weights:
            scores = torch.bmm(_normed(x).bfloat16().float(), weights["coarse"]).bfloat16().float()
        if routes is None:
            best = scores.detach().topk(ACTIVE, -1).indices
            routes = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        gate = scores.masked_fill(~routes, -torch.inf).softmax(-1)
        hidden = (hidden.unflatten(-1, (world.experts, -1)) * gate[..., None]).flatten(-2)
    return torch.bmm(hidden, weights["down"]), routes


def token_logp(
    world: World, weights: Mapping[str, Tensor], prompts: Tensor, text: Tensor, routes: Tensor | None = None
) -> Tensor:
    """Return the log-probability [M, B, L] of every word of texts.

    Args:
        world: of the models.
        weights: of M models, `unpack`.
        prompts: [M, B].
        text: [M, B, L].
        routes: the experts that each word is sent to, [M, B L, experts] bool; None lets the router choose.
    """
    m, b, t = text.shape
    read = torch.cat([prompts[..., None], text[..., :-1]], -1)
    x = (_embedded(weights, read) + weights["place"][:, None]).view(m, b * t, WIDTH)
    q, k, v = (y[:, None] for y in _split(torch.bmm(_normed(x), weights["qkv"]), m, b))
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + torch.bmm(mixed.reshape(m, b * t, WIDTH), weights["out"])
    x = x + _experts(world, weights, x, routes)[0]
    logits = torch.bmm(_normed(x), weights["head"]).view(m * b * t, VOCABULARY)
    return -cross_entropy(logits, text.reshape(-1), reduction="none").view(m, b, t)


# The sampler.


def _attended(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention [N, 1, WIDTH] of one query each [N, 1, WIDTH] over keys and values [N, t, WIDTH]."""
    scores = torch.bmm(q, keys.transpose(1, 2)) * WIDTH**-0.5
    return torch.bmm(scores.softmax(-1), values)


def sampler_weights(world: World, theta: Tensor, precision: str, router: str = "fp32") -> dict[str, Tensor]:
    """Return the weights of the sampler: rounded as `drpo.model.quantize` rounds them.

    A grid's scale is that of an output channel. Embeddings, head and router of a sampler on a grid are bf16.

    Args:
        world: of the models.
        theta: [M, P].
        precision: fp32, bf16, int8, fp8_weights.
        router: fp32, or bf16 for scores in bf16, whose ties go to other experts.
    """
    weights = unpack(world, theta.detach())
    grid = GRIDS.get(precision, (None, None))[0]
    dtype = DTYPES.get(precision, torch.bfloat16)
    rounded = {
        name: to_grid(w, grid, dim=-2).dense(torch.float32)
        if grid is not None and name in ("qkv", "out", "up", "down")
        else w.to(dtype).float()
        for name, w in weights.items()
    }
    return rounded | ({"coarse": rounded["router"].bfloat16().float()} if router == "bf16" else {})


@dataclass(frozen=True, eq=False)
class Answers:
    """What M samplers answered.

    Args:
        text: [M, B, L].
        logp: [M, B, L], the sampler's log-probability of every word; 0 where the environment spoke.
        routes: [M, B, L, experts] bool, or None.
    """

    text: Tensor
    logp: Tensor
    routes: Tensor | None


@torch.no_grad()
def answers(
    world: World, weights: Mapping[str, Tensor], prompts: Tensor, cues: Tensor, any_cues: Tensor, uniform: Tensor
) -> Answers:
    """Sample answers, word by word.

    Args:
        world: of the models.
        weights: of M models.
        prompts: [M, B].
        cues: [M, B], the classes that are asked for.
        any_cues: [M, B], what the environment says to who guesses.
        uniform: [M, B, L] in [0, 1), which alone decides the words, given the distributions.
    """
    m, b = prompts.shape
    text, logp = torch.empty(m, b, LENGTH, dtype=torch.long), torch.zeros(m, b, LENGTH)
    routes = torch.zeros(m, b, LENGTH, world.experts, dtype=torch.bool) if world.experts > 1 else None
    keys, values = torch.empty(2, m * b, LENGTH, WIDTH)
    read = prompts
    for t in range(LENGTH):
        x = _embedded(weights, read) + weights["place"][:, None, t]
        q, keys[:, t : t + 1], values[:, t : t + 1] = _split(torch.bmm(_normed(x), weights["qkv"]), m, b)
        mixed = _attended(q, keys[:, : t + 1], values[:, : t + 1])
        x = x + torch.bmm(mixed.view(m, b, WIDTH), weights["out"])
        added, taken = _experts(world, weights, x, None)
        p = torch.bmm(_normed(x + added), weights["head"]).softmax(-1)
        below = p.cumsum(-1)
        read = torch.searchsorted(below, uniform[..., t : t + 1] * below[..., -1:], right=True)[..., 0]
        read = read.clamp(max=VOCABULARY - 1)
        if routes is not None and taken is not None:
            routes[:, :, t] = taken
        if world.kept[t]:
            logp[..., t] = p.gather(-1, read[..., None])[..., 0].log()
        else:
            read = CUES + torch.where(text[..., 0] == CALL, cues, any_cues)
        text[..., t] = read
    return Answers(text, logp, routes)


# Training.


class Adam:
    """AdamW without decay of M models side by side, after clipping the gradient of each to norm 1.

    Args:
        theta: [M, P].
        rates: [M], learning rates.
    """

    betas, eps = (0.9, 0.999), 1e-8

    def __init__(self, theta: Tensor, rates: Tensor) -> None:
        self.theta, self.rates, self.steps = theta, rates[:, None], 0
        self.first, self.second = torch.zeros_like(theta), torch.zeros_like(theta)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Take a step along a gradient [M, P]."""
        gradient = gradient * (1 / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        self.steps += 1
        low, high = self.betas
        self.first.lerp_(gradient, 1 - low)
        self.second.mul_(high).addcmul_(gradient, gradient, value=1 - high)
        scale = (self.second / (1 - high**self.steps)).sqrt_().add_(self.eps)
        self.theta -= self.rates / (1 - low**self.steps) * (self.first / scale)


@lru_cache
def speaker(world: World, steps: int = 400, rows: int = 16) -> Tensor:
    """Return the weights [1, P] of a model that has learnt the world's language; the same for all runs."""
    generator = torch.Generator().manual_seed(derive("speaker", repr(world)))
    wide = [torch.randn(shape, generator=generator) / sqrt(shape[0]) for shape in world.shapes.values()]
    theta = torch.cat([w.flatten() for w in wide])[None].requires_grad_()
    optimizer = Adam(theta, torch.tensor([1e-2]))
    for step in range(steps):
        optimizer.rates = torch.tensor([[1e-2 * (1 - step / steps)]])
        loss = -token_logp(world, unpack(world, theta), *world.texts(rows, generator)).mean()
        optimizer.step(torch.autograd.grad(loss, theta)[0])
    return theta.detach()


@dataclass(frozen=True)
class Regime:
    """How data come about.

    Args:
        world: language and model.
        updates: of a rollout, each on its own part of it; the last of them is `updates - 1` steps off-policy.
        precision: of the sampler; the trainer is fp32.
        router: of the sampler, fp32 or bf16.
        replay: the trainer sends tokens to the experts that the sampler chose.
        steps: optimiser updates of a run.
        heat: factor of every learning rate.
    """

    world: World = World()
    updates: int = 1
    precision: str = "bf16"
    router: str = "fp32"
    replay: bool = False
    steps: int = 192
    heat: float = 1.0


@dataclass(frozen=True)
class Run:
    """One run of a batch.

    Args:
        objective: the loss.
        rate: learning rate.
        seed: of problems and random numbers.
    """

    objective: Objective
    rate: float
    seed: int


PARTS = 4
"""Parts of a run over which figures are averaged."""


@dataclass(frozen=True, eq=False)
class Curves:
    """What M runs did.

    Args:
        start, end: [M], mean reward of the policy itself, before training, and over four evaluations in the last
            quarter.
        reward: [M, PARTS] of the sampled answers.
        figures: name -> [M, PARTS]: `entropy` (nats, of the sampler, at its own samples), `mu` (mean probability of a
            sampled word), `k3` (nats, from sampler to policy over all updates), `mismatch` (the same at a rollout's
            first update: the sampler's precision alone), `prob_diff` (mean |pi - mu|), `far` (share of words with
            |pi - mu| > 0.2).
    """

    start: Tensor
    end: Tensor
    reward: Tensor
    figures: Mapping[str, Tensor]


def train(regime: Regime, runs: Sequence[Run]) -> Curves:
    """Train runs side by side; runs of equal objectives must stand together.

    Args:
        regime: of all of them.
        runs: at least one.
    """
    world, m = regime.world, len(runs)
    theta = speaker(world).repeat(m, 1).requires_grad_()
    optimizer = Adam(theta, torch.tensor([run.rate * regime.heat for run in runs]))
    parts = {name: torch.zeros(m, PARTS) for name in ("reward", "entropy", "mu", "k3", "mismatch", "prob_diff", "far")}
    start, ends = _evaluate(regime, runs, theta), []
    rollouts = regime.steps // regime.updates
    checks = {rollouts - 1 - (i * rollouts) // 16 for i in range(4)}
    keep = world.kept
    for rollout in range(rollouts):
        weights = sampler_weights(world, theta, regime.precision, regime.router)
        prompts, cues, any_cues, uniform = _problems(world, runs, rollout, regime.updates * GROUPS, GROUP)
        sampled = answers(world, weights, prompts, cues, any_cues, uniform)
        reward = world.reward(sampled.text, cues)
        grouped = reward.view(m, -1, GROUP)
        advantage = (grouped - grouped.mean(-1, keepdim=True)).view(m, -1)
        part = rollout * PARTS // rollouts
        share = PARTS / rollouts
        logged = sampled.logp[..., keep]
        parts["reward"][:, part] += share * reward.mean(1)
        parts["entropy"][:, part] -= share * logged.mean((1, 2))
        parts["mu"][:, part] += share * logged.exp().mean((1, 2))
        for update in range(regime.updates):
            rows = slice(update * ROWS, (update + 1) * ROWS)
            logp = _update(regime, runs, optimizer, prompts[:, rows], _rows(sampled, rows), advantage[:, rows])
            gap = (logp - sampled.logp[:, rows])[..., keep]
            moved = (logp.exp() - sampled.logp[:, rows].exp())[..., keep].abs()
            k3 = (torch.expm1(gap) - gap).mean((1, 2))
            parts["k3"][:, part] += share * k3 / regime.updates
            parts["mismatch"][:, part] += share * k3 * (update == 0)
            parts["prob_diff"][:, part] += share * moved.mean((1, 2)) / regime.updates
            parts["far"][:, part] += share * (moved > 0.2).float().mean((1, 2)) / regime.updates
        if rollout in checks:
            ends.append(_evaluate(regime, runs, theta))
    return Curves(start, torch.stack(ends).mean(0), parts.pop("reward"), parts)


def _rows(sampled: Answers, rows: slice) -> Answers:
    routes = None if sampled.routes is None else sampled.routes[:, rows]
    return Answers(sampled.text[:, rows], sampled.logp[:, rows], routes)


def _update(
    regime: Regime, runs: Sequence[Run], optimizer: Adam, prompts: Tensor, sampled: Answers, advantage: Tensor
) -> Tensor:
    """Take one step on answers [M, ROWS]; return their log-probabilities before it."""
    world, theta = regime.world, optimizer.theta
    routes = sampled.routes.flatten(1, 2) if regime.replay and sampled.routes is not None else None
    logp = token_logp(world, unpack(world, theta), prompts, sampled.text, routes)
    loss = summed_loss(world, runs, logp, sampled.logp, advantage)
    optimizer.step(torch.autograd.grad(loss, theta)[0])
    return logp.detach()


def summed_loss(world: World, runs: Sequence[Run], logp: Tensor, behavior_logp: Tensor, advantage: Tensor) -> Tensor:
    """Return the sum over runs of each run's own loss: `drpo.objectives` with the horizon reduction.

    Args:
        world: says where the environment speaks.
        runs: M runs.
        logp, behavior_logp: [M, B, L].
        advantage: [M, B].
    """
    _, b, t = logp.shape
    losses, first = [], 0
    while first < len(runs):
        objective = runs[first].objective
        n = next((i for i, run in enumerate(runs[first:]) if run.objective != objective), len(runs) - first)
        mine = slice(first, first + n)
        sequence = torch.arange(n * b).repeat_interleave(t)
        keep = world.kept.repeat(n * b)
        weight = Horizon(LENGTH)(keep[: b * t], sequence[: b * t]).repeat(n)
        tokens = Tokens(
            logp=logp[mine].flatten(),
            behavior_logp=behavior_logp[mine].flatten().clamp(max=0),
            advantage=advantage[mine, :, None].expand(-1, -1, t).flatten(),
            keep=keep,
            sequence=sequence,
        )
        losses.append(total(objective, tokens, weight))
        first += n
    return torch.stack(losses).sum()


def _problems(world: World, runs: Sequence[Run], rollout: int | str, groups: int, group: int) -> tuple[Tensor, ...]:
    """Return prompts, cues and any cues [M, B], and uniforms [M, B, L], which depend on seed and rollout alone."""
    drawn = {}
    for seed in {run.seed for run in runs}:
        generator = torch.Generator().manual_seed(derive("regions", seed, rollout))
        cues = torch.randint(CLASSES, (groups,), generator=generator).repeat_interleave(group)
        any_cues = torch.randint(CLASSES, (groups * group,), generator=generator)
        drawn[seed] = cues, any_cues, torch.rand(groups * group, LENGTH, generator=generator)
    cues, any_cues, uniform = (torch.stack(column) for column in zip(*(drawn[run.seed] for run in runs), strict=True))
    return torch.full_like(cues, QUESTION) if world.turn else CUES + cues, cues, any_cues, uniform


def _evaluate(regime: Regime, runs: Sequence[Run], theta: Tensor) -> Tensor:
    """Return [M] the mean reward of the policies themselves, in fp32, on problems that no rollout has."""
    prompts, cues, any_cues, uniform = _problems(regime.world, runs, "evaluation", EVALUATED, 1)
    text = answers(regime.world, unpack(regime.world, theta.detach()), prompts, cues, any_cues, uniform).text
    return regime.world.reward(text, cues).mean(1)
