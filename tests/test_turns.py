"""Episodes of several turns and branches: what is trained, what counts as a sequence, what a turn's reward is worth.

A small model talks to an environment whose second reply its chat template leaves out, so that the third turn is in a
branch. Not covered: real weights, several processes, environments that fail (test_environment_pool.py), and runs as a
whole (test_agents.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from drpo import reductions
from drpo.batch import make_batches
from drpo.credit import advantages, gae_credit, group_credit
from drpo.credit.gae import GAE
from drpo.environments.local import LocalEnvironments
from drpo.errors import InputError
from drpo.objectives import CPPO, DRPO, GSPO, Objective, ratio
from drpo.ops import Head, SampledTokens, linear_policy_loss
from drpo.ranks import Ranks
from drpo.reductions import Horizon
from drpo.rewards import RewardConfig, Scored
from drpo.rollout import EpisodeDriver, TransformersEngine
from drpo.train.config import configure
from drpo.train.log import trained_records
from drpo.train.score import score
from drpo.train.setup import build
from drpo.train.step import balance_micro_batches, per_sequence
from drpo.types import (
    Batch,
    Episode,
    Generation,
    MicroBatch,
    Played,
    Problem,
    Request,
    RewardResult,
    Sampling,
    ScoredGroup,
    TokenSequence,
    Transcript,
)
from drpo.types.environment import Observation, StepResult, Turn
from drpo.types.problem import message
from support.tiny_world import PROBLEMS, doubled, how, perturb, sampled, sees, tiny
from support.updates import Cramped, close, equal, gradients, policy_of
from support.worlds import tiny_run

pytestmark = pytest.mark.filterwarnings("ignore:.*CPU autocast.*:UserWarning")

TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role[0] }}{{ m.content }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
STOPS = frozenset(range(40))
"""Of 257 tokens: some turns end, others are cut off."""
REDUCTIONS = {"token_mean": reductions.token_mean, "sequence_mean": reductions.sequence_mean, "horizon": Horizon(30)}
WIDE = GSPO(0.99, 9.0)
"""No clip binds."""


def reward_of(token_ids: Sequence[int]) -> float:
    """What the environment pays for a turn that ended."""
    return float(token_ids[0] % 5) if token_ids[-1] in STOPS else 0.0


class Talking:
    """Opens episodes of three turns: a user replies to the first, a tool to the second."""

    max_turns = 3

    def open(self, problem: Problem, seed: int) -> "Talk":
        return Talk(problem)


@dataclass
class Talk:
    problem: Problem
    turns: int = 0

    def reset(self) -> Observation:
        return Observation(self.problem.messages)

    def step(self, turn: Turn) -> StepResult:
        self.turns += 1
        reply = message(("user", "tool", "user")[self.turns - 1], "go on")
        return StepResult((reply,), reward=reward_of(turn.token_ids), done=self.turns == 3)

    def close(self) -> None:
        pass


class Recording:
    """An engine that keeps what it was asked and what it said, by problem and sample."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.said: dict[tuple[str, int], list[tuple[Tensor, Generation]]] = {}

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        generations = self._engine.generate(requests)
        for request, generation in zip(requests, generations, strict=True):
            _, problem, sample, *_ = request.key
            self.said.setdefault((str(problem), int(sample)), []).append((request.prompt_ids, generation))
        return generations

    def release(self) -> None:
        self._engine.release()


@dataclass
class Totals:
    """A reward that says the sample's number, and so differs within each group."""

    config: RewardConfig = field(default_factory=RewardConfig)

    def score(self, items: Sequence[tuple[Problem, Transcript]]) -> list[Scored]:
        return [Scored(RewardResult(float(i % 3)), None, 0.0) for i, _ in enumerate(items)]


@dataclass(frozen=True)
class World:
    """Three groups of three episodes, and what the engine said in each."""

    rollout: list[tuple[Episode, ...]]
    said: dict[tuple[str, int], list[tuple[Tensor, Generation]]]

    @property
    def episodes(self) -> list[Episode]:
        return [e for group in self.rollout for e in group]

    @property
    def groups(self) -> list[ScoredGroup]:
        return score(PROBLEMS[:3], self.rollout, Totals())  # type: ignore[arg-type]

    def turns(self, e: Episode) -> list[list[int]]:
        """The ids of each turn, as the engine sampled them."""
        return [generation.token_ids.tolist() for _, generation in self.said[e.problem_id, e.sample]]

    def batches(self, **changes: object) -> list[Batch]:
        groups = self.groups
        return make_batches(groups, group_credit(groups, advantage=advantages.mean), how(**changes))

    def batch(self, **changes: object) -> Batch:
        (batch,) = self.batches(**changes)
        return batch


@pytest.fixture(scope="module")
def world() -> World:
    model, tokenizer = tiny(STOPS)
    tokenizer.chat_template = TEMPLATE
    driver = EpisodeDriver.of(Recording(TransformersEngine(model)), model, tokenizer)  # type: ignore[arg-type]
    driver = replace(driver, environments=LocalEnvironments(Talking()))  # type: ignore[arg-type]
    rollout = driver.run(PROBLEMS[:3], Sampling(samples=3, max_new_tokens=9), (3,))
    world = World(rollout, driver.engine.said)  # type: ignore[attr-defined]
    assert {len(e.turns) for e in world.episodes} == {1, 2, 3} and {len(e.sequences) for e in world.episodes} == {1, 2}
    return world


def by_number(micros: Sequence[MicroBatch], name: str, column: Tensor) -> dict[int, Tensor]:
    """The parts of a [T] column, T over all micro-batches in order, by their number in another one."""
    number = torch.cat([getattr(m, name) for m in micros])
    return {int(i): column[number == i] for i in number.unique()}


def column(batch: Batch, name: str) -> Tensor:
    return torch.cat([getattr(m, name) for m in batch.micro_batches])


def plain_logp(model: torch.nn.Module, s: TokenSequence) -> Tensor:
    """[M] of the sampled tokens: one row, no packing, no cache."""
    ids = torch.cat([s.prompt_ids, s.token_ids])
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(s.prompt_ids) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, s.token_ids[:, None])[s.sampled, 0]


# ---- what is trained ----


@pytest.mark.parametrize("budget", [1, 150, 10_000])
def test_what_the_engine_sampled_is_trained_once_and_nothing_else(world: World, budget: int) -> None:
    """Stop tokens too; each is predicted from exactly what the engine had read before it."""
    batch = world.batch(micro_batch_tokens=budget)
    targets = by_number(batch.micro_batches, "row", column(batch, "target"))
    mu = by_number(batch.micro_batches, "row", column(batch, "behavior_logp"))
    for e, numbers in zip(world.episodes, map(sorted, episodes_of(world)), strict=True):
        said = [generation for _, generation in world.said[e.problem_id, e.sample]]
        assert torch.equal(torch.cat([targets[i] for i in numbers]), torch.cat([g.token_ids for g in said]))
        assert torch.equal(torch.cat([mu[i] for i in numbers]), torch.cat([g.behavior_logp for g in said]))
    said = [answer for answers in world.said.values() for answer in answers]
    assert batch.n_tokens == len(column(batch, "target")) == sum(len(g.token_ids) for _, g in said)
    contexts = {
        tuple(torch.cat([prompt, g.token_ids[:k]]).tolist()) for prompt, g in said for k in range(len(g.token_ids))
    }
    for m in batch.micro_batches:
        assert {tuple(m.input_ids[sees(m.layout, p)].tolist()) for p in m.position.tolist()} <= contexts


def test_a_branch_has_the_log_probabilities_of_a_plain_pass_over_it(world: World) -> None:
    """Packed with its group, at every turn; a record of each row has its own, and so have values row by row."""
    model, _ = tiny(STOPS)
    batch = world.batch(micro_batch_tokens=10_000, sequence="row")
    policy = policy_of(model)
    _, stats = gradients(policy, batch)
    with torch.no_grad():
        values = per_sequence(policy, world.groups, lambda micro: policy(micro)[0], micro_batch_tokens=150)
    assert (ratio(stats.tokens) - 1).abs().max() < 1e-5
    records = trained_records([batch], [stats])
    for i, s in enumerate(c.sequence for c in batch.credits):
        wanted = plain_logp(model, s).detach()
        torch.testing.assert_close(stats.tokens.logp[stats.row == i], wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.tensor(records[s]["logp"]), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(values[i], wanted, rtol=0, atol=1e-5)


def test_environment_tokens_have_no_gradient_whatever_they_are(world: World) -> None:
    """Other targets, log-probabilities and advantages of theirs change no bit; without them it is the same update."""
    rows = [s for e in world.episodes for s in e.sequences]
    keep = torch.cat([s.sampled for s in rows])
    lengths = torch.tensor([len(s.token_ids) for s in rows])
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(len(keep), 8, generator=generator), Head(torch.randn(257, 8, generator=generator))
    noise = torch.randint(257, keep.shape, generator=generator)
    tokens = SampledTokens(
        target=torch.cat([s.token_ids for s in rows]),
        behavior_logp=torch.zeros(len(keep)).masked_scatter(keep, torch.cat([s.behavior_logp for s in rows])),
        advantage=torch.randn(len(keep), generator=generator),
        keep=keep,
        sequence=torch.arange(len(rows)).repeat_interleave(lengths),
        weight=keep.float(),
    )
    other = replace(
        tokens,
        target=torch.where(keep, tokens.target, noise),
        behavior_logp=torch.where(keep, tokens.behavior_logp, -noise.float()),
        advantage=torch.where(keep, tokens.advantage, -3.0),
    )
    removed = SampledTokens(**{name: v[keep] for name, v in vars(tokens).items() if v is not None})
    for objective in (DRPO(0.2), WIDE):
        seen, changed, alone = (
            _loss_and_gradient(h, head, t, objective)
            for h, t in ((hidden, tokens), (hidden, other), (hidden[keep], removed))
        )
        assert torch.equal(seen[0], changed[0]) and torch.equal(seen[1], changed[1])
        assert not seen[1][~keep].any() and seen[1][keep].any()
        torch.testing.assert_close(seen[0], alone[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen[1][keep], alone[1], rtol=1e-5, atol=1e-6)


def _loss_and_gradient(
    hidden: Tensor, head: Head, tokens: SampledTokens, objective: Objective
) -> tuple[Tensor, Tensor]:
    leaf = hidden.clone().requires_grad_()
    loss = linear_policy_loss(leaf, head, tokens, objective).loss
    loss.backward()
    return loss.detach(), leaf.grad


# ---- what a sequence is ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sequence", ["episode", "turn", "row"])
def test_reductions_count_episodes_whatever_the_objective_takes_as_a_sequence(
    world: World, reduction: str, sequence: str
) -> None:
    """By its definition, and as if the environment's tokens were there and masked."""
    batch = world.batch(reduction=REDUCTIONS[reduction], sequence=sequence)
    n, total = len(world.episodes), sum(e.n_sampled for e in world.episodes)
    masked = torch.cat([s.sampled for e in world.episodes for s in e.sequences])
    episode = torch.cat([torch.full_like(s.token_ids, i) for i, e in enumerate(world.episodes) for s in e.sequences])
    weights = REDUCTIONS[reduction](masked, episode)[masked]
    rows = by_number(batch.micro_batches, "row", column(batch, "weight"))
    assert torch.equal(torch.cat([rows[i] for i in sorted(rows)]), weights) and batch.n_episodes == n
    for e, numbers in zip(world.episodes, episodes_of(world), strict=True):
        share = {"token_mean": 1 / total, "sequence_mean": 1 / (n * e.n_sampled), "horizon": 1 / (n * 30)}[reduction]
        for i in numbers:
            torch.testing.assert_close(rows[i], torch.full_like(rows[i], share))


def sequence_numbers(world: World, sequence: str) -> list[Tensor]:
    """The number of each sampled token's sequence, by row, counted by hand."""
    numbers, turns = [], 0
    for i, e in enumerate(world.episodes):
        of_turns = [turns + t for t, ids in enumerate(world.turns(e)) for _ in ids]
        turns += len(e.turns)
        for s in e.sequences:
            own, of_turns = of_turns[: s.n_sampled], of_turns[s.n_sampled :]
            numbers.append(
                torch.tensor({"turn": own, "episode": [i] * len(own), "row": [len(numbers)] * len(own)}[sequence])
            )
    return numbers


@pytest.mark.parametrize("sequence", ["episode", "turn", "row"])
def test_a_sequence_level_gradient_is_that_of_the_plain_formula(world: World, sequence: str) -> None:
    """-sum of w A s over the sampled tokens, s the geometric mean of a sequence's ratios, by autograd, row by row."""
    model, _ = tiny(STOPS)
    model = doubled(perturb(model, 0.05))
    batch = world.batch(sequence=sequence, reduction=reductions.sequence_mean)
    found, _ = gradients(policy_of(model, dtype=torch.float64), batch, WIDE)
    number = torch.cat(sequence_numbers(world, sequence))
    rows = [c.sequence for c in batch.credits]
    logp = torch.cat([plain_logp(model, s) for s in rows])
    mu = torch.cat([s.behavior_logp for s in rows]).double()
    mean = torch.stack([(logp - mu)[number == i].mean() for i in number]).detach()
    weight = torch.cat(
        [
            torch.full((s.n_sampled,), 1 / (len(world.episodes) * e.n_sampled))
            for e in world.episodes
            for s in e.sequences
        ]
    )
    advantage = torch.cat([c.advantage for c in batch.credits])
    loss = -(weight * advantage * mean.exp() * (logp - logp.detach()).exp()).sum()
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    close(found, dict(zip([n for n, _ in model.named_parameters()], wanted, strict=True)), 1e-6)


def parts(micros: Sequence[MicroBatch]) -> list[set[int]]:
    return [set(m.row.tolist()) for m in micros]


def episodes_of(world: World) -> list[set[int]]:
    """The numbers of each episode's rows."""
    ends = [0]
    for e in world.episodes:
        ends.append(ends[-1] + len(e.sequences))
    return [set(range(a, b)) for a, b in pairwise(ends)]


def splits(episodes: list[set[int]], micros: Sequence[MicroBatch]) -> bool:
    """Whether the rows of some episode are in different micro-batches."""
    return any(0 < len(part & e) < len(e) for part in parts(micros) for e in episodes)


@pytest.mark.parametrize(
    ("sequence", "objective"),
    [
        pytest.param("episode", WIDE, id="gspo of episodes"),
        pytest.param("turn", WIDE, id="gspo of turns", marks=pytest.mark.slow),
        pytest.param("episode", CPPO(0.01, 0.2, 1e-4), id="cppo"),
        pytest.param("row", DRPO(0.2), id="drpo"),
    ],
)
def test_splitting_a_batch_changes_nothing_and_splits_no_sequence(
    world: World, sequence: str, objective: Objective
) -> None:
    """By the budget, over ranks, and where memory runs out: each of them takes apart what may be taken apart."""
    model, _ = tiny(STOPS)
    policy = policy_of(doubled(perturb(model, 0.05)), dtype=torch.float64)
    episodes = episodes_of(world)
    whole = world.batch(sequence=sequence, micro_batch_tokens=100_000)
    assert len(whole.micro_batches) == 1
    wanted, stats = gradients(policy, whole, objective)
    batch = world.batch(sequence=sequence, micro_batch_tokens=150)
    assert len(batch.micro_batches) > 3 and splits(episodes, batch.micro_batches) == (sequence != "episode")
    found, other = gradients(policy, batch, objective)
    close(found, wanted, 1e-10)
    assert other.loss == pytest.approx(stats.loss, abs=1e-10)
    batch = world.batch(sequence=sequence, micro_batch_tokens=1, ranks=2)
    shares = [balance_micro_batches(batch.micro_batches, Ranks(r, 2))[0] for r in range(2)]
    on_rank = [set().union(*parts(micros)) for micros in shares]
    assert not on_rank[0] & on_rank[1] and on_rank[0] | on_rank[1] == set(range(len(batch.credits)))
    assert any(0 < len(rank & e) < len(e) for rank in on_rank for e in episodes) == (sequence != "episode")
    halves = [gradients(policy, replace(batch, micro_batches=tuple(micros)), objective)[0] for micros in shares]
    close({name: halves[0][name] + halves[1][name] for name in wanted}, wanted, 1e-10)
    least = max(len(m.input_ids) for m in world.batch(sequence=sequence, micro_batch_tokens=1).micro_batches)
    device = Cramped(policy, room=least)
    found, other = gradients(policy, whole, objective)
    assert len(device.tried) > 3 and sorted(other.row.tolist()) == sorted(stats.row.tolist())
    close(found, wanted, 1e-10)


def test_an_episode_that_must_not_be_split_and_does_not_fit_is_named(world: World) -> None:
    """Its rows would fit one by one."""
    least = max(len(m.input_ids) for m in world.batch(sequence="row", micro_batch_tokens=1).micro_batches)
    policy = policy_of(tiny(STOPS)[0])
    Cramped(policy, room=least)
    gradients(policy, world.batch(sequence="row"), DRPO(0.2))
    with pytest.raises(InputError, match=r"out of memory with a single completion of \d+ tokens: lower"):
        gradients(policy, world.batch(sequence="episode"), WIDE)


def first_turn_alone(e: Episode) -> RewardResult:
    """Rewards that differ at the first turn of episodes that have several, and are 0 at all others."""
    several = len(e.turns) > 1
    return RewardResult(0.0, turns=(3.0**e.sample * several, *[0.0] * (len(e.turns) - 1)))


def test_a_row_is_skipped_where_its_sequence_has_no_advantage(world: World) -> None:
    """Branches without advantages, of episodes that have some; what is skipped has no gradient, to the bit."""
    groups = [replace(g, results=tuple(map(first_turn_alone, g.episodes))) for g in world.groups]
    credits = group_credit(groups, advantage=advantages.mean)
    silent = [not c.advantage.any() for c in credits]
    branches = [i for e in episodes_of(world) for i in sorted(e)[1:]]
    assert branches and all(silent[i] for i in branches) and sum(silent) == len(branches)
    policy = policy_of(perturb(tiny(STOPS)[0], 0.02))
    for sequence, skipped in (("episode", 0), ("turn", len(branches)), ("row", len(branches))):
        config = how(sequence=sequence, micro_batch_tokens=1)
        (every,), (fewer,) = (
            make_batches(groups, credits, replace(config, skip_zero_advantage=s)) for s in (False, True)
        )
        assert (every.n_skipped, fewer.n_skipped) == (0, skipped)
        assert (every.n_episodes, every.n_tokens) == (fewer.n_episodes, fewer.n_tokens)
        if sequence == "turn":
            assert equal(gradients(policy, every, WIDE)[0], gradients(policy, fewer, WIDE)[0])


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_an_episode_is_in_one_update(world: World, updates: int) -> None:
    batches = world.batches(updates=updates)
    assert len(batches) == updates
    assert [c.sequence for b in batches for c in b.credits] == [s for e in world.episodes for s in e.sequences]
    for batch in batches:
        rows = {c.sequence for c in batch.credits}
        whole = [e for e in world.episodes if rows & set(e.sequences)]
        assert all(set(e.sequences) <= rows for e in whole) and batch.n_episodes == len(whole)
        assert whole == [e for e in world.episodes if e.problem_id in {e.problem_id for e in whole}]


def test_an_environment_of_one_turn_makes_the_batches_of_plain_episodes_bit_for_bit() -> None:
    plain = sampled(*tiny(STOPS))
    played = [replace(e, played=Played((0.0,), done=True)) for e in plain]
    batches = []
    for episodes in (plain, played):
        rollout = [[e for e in episodes if e.problem_id == p.id] for p in PROBLEMS]
        groups = score(PROBLEMS, rollout, Totals())  # type: ignore[arg-type]
        for sequence in ("episode", "turn", "row"):
            credits = group_credit(groups, advantage=advantages.mean)
            batches.append(make_batches(groups, credits, how(sequence=sequence, micro_batch_tokens=150)))
    first, *others = batches
    for other in others:
        for a, b in zip(first[0].micro_batches, other[0].micro_batches, strict=True):
            assert a.layout == b.layout and torch.equal(a.row, a.sequence)
            for name, value in vars(a).items():
                assert not isinstance(value, Tensor) or torch.equal(value, getattr(b, name)), name


# ---- what a turn's reward is worth ----


def rewards_of(world: World, e: Episode) -> list[float]:
    """The reward of each turn, the total at the last."""
    *before, last = [reward_of(turn) for turn in world.turns(e)]
    return [*before, last + e.sample]


def by_token(world: World, credits: Iterator[Tensor], e: Episode) -> list[float]:
    """An episode's advantages, token by token, over all of its rows."""
    return torch.cat([next(credits) for _ in e.sequences]).tolist()


@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_a_token_is_credited_with_its_turn_and_what_follows(world: World, discount: float) -> None:
    """R_t - mean of R_{j, min(t, T_j - 1)}, R_t = r_t + discount R_{t+1}, once for each token, in whichever row."""

    def to_go(e: Episode, t: int) -> float:
        rewards = rewards_of(world, e)
        t = min(t, len(rewards) - 1)
        return sum(discount ** (u - t) * rewards[u] for u in range(t, len(rewards)))

    credits = iter([c.advantage for c in group_credit(world.groups, advantage=advantages.mean, discount=discount)])
    for group in world.rollout:
        for e in group:
            wanted = [
                to_go(e, t) - sum(to_go(other, t) for other in group) / len(group)
                for t, turn in enumerate(world.turns(e))
                for _ in turn
            ]
            assert by_token(world, credits, e) == pytest.approx(wanted, abs=1e-5)


def test_a_critics_advantages_chain_through_turns_and_branches(world: World) -> None:
    """Token by token over what was sampled: what the environment said neither discounts nor bootstraps."""
    gamma, lam = 0.9, 0.8
    values = [
        torch.linspace(-1, 1, s.n_sampled) + i for i, s in enumerate(s for e in world.episodes for s in e.sequences)
    ]
    own = iter(values)
    credits = iter([c.advantage for c in gae_credit(world.groups, values, critic=GAE(gamma, lam, whiten=False))])
    for e in world.episodes:
        value = torch.cat([next(own) for _ in e.sequences]).tolist()
        reward = [
            r if last else 0.0
            for r, turn in zip(rewards_of(world, e), world.turns(e), strict=True)
            for last in (*[False] * (len(turn) - 1), True)
        ]
        wanted, advantage, following = [], 0.0, 0.0
        for r, v in zip(reversed(reward), reversed(value), strict=True):
            advantage = r + gamma * following - v + gamma * lam * advantage
            following = v
            wanted.insert(0, advantage)
        assert by_token(world, credits, e) == pytest.approx(wanted, abs=1e-4)


# ---- the option ----


def test_an_objective_of_tokens_has_no_use_for_the_option() -> None:
    with pytest.raises(
        InputError, match=r"^sequence=turn: the objective weighs each token by itself; leave it out, or use"
    ):
        configure(tiny_run(), sequence="turn")
    with pytest.raises(InputError, match=r"sequence='turns'; did you mean 'turn'\?"):
        configure(tiny_run(), objective=GSPO(), sequence="turns")
    runs = {
        "row": tiny_run(),
        "episode": tiny_run(objective=GSPO()),
        "turn": tiny_run(objective=GSPO(), sequence="turn"),
    }
    assert [build(run).batch_config.sequence for run in runs.values()] == list(runs)
