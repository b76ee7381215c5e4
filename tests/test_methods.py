"""Methods by name: each is its paper's whole recipe, `--method` sets all of it, and options given besides win."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drpo import cli
from drpo.batch import make_batches
from drpo.cli.commands.train import TrainOptions
from drpo.cli.methods import method_changes, method_lines
from drpo.cli.overrides import helps, overridden
from drpo.credit import credit_rule
from drpo.credit.advantages import maxrl, mean, zscore
from drpo.credit.gae import GAE
from drpo.credit.overlong import Shaped, mask
from drpo.errors import InputError
from drpo.lab.grid import parse_variant
from drpo.methods import METHODS, described, find
from drpo.objectives import SPO, ImportanceSampling, PPOClip, of_batch
from drpo.recipes import find as recipe
from drpo.reductions import Horizon, token_mean
from drpo.train.config import Run, configure, load_run, read_value, value_of
from drpo.train.loop import train
from drpo.train.records import METRICS, ROLLOUTS, read_records
from drpo.train.setup import build
from drpo.types import Batch, Episode, Generation, Problem, RewardResult, Sampling, ScoredGroup, Tokens, TokenSequence
from support.worlds import few_run, tiny_run

# ------------------------------------------------------------------------------------------ a rollout, in plain numbers

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
LIMIT = 10
REWARDS = ((1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0), (0.25, 1.0, 0.5, 0.5), (1.0, 1.0, 1.0, 0.0))
LENGTHS = ((3, 10, 9, 1), (2, 10, 5, 4), (10, 8, 7, 10), (9, 6, 10, 2))


@dataclass
class Answer:
    """A completion: log-probabilities now (float64, with a gradient) and then, reward, and the critic's values."""

    l: Tensor
    m: Tensor
    reward: float
    cut: bool
    value: Tensor

    @property
    def n(self) -> int:
        return len(self.l)

    @property
    def parts(self) -> dict[str, float]:
        """What the reward is the sum of, brevity counting half: in the second group the sums alone are equal."""
        short = float(self.n <= 5)
        return {"right": self.reward - 0.5 * short, "short": short}


WEIGHTS = {"right": 1.0, "short": 0.5}


Rollout = list[list[Answer]]


def drawn(on_policy: bool = False) -> Rollout:
    generator = torch.Generator().manual_seed(3)

    def answer(reward: float, n: int) -> Answer:
        m = (-2 * torch.rand(n, generator=generator)).float()
        moved = torch.clamp(m + 0.3 * torch.randn(n, generator=generator), max=-1e-3).float()
        value = torch.rand(n, generator=generator).float()
        now = (m if on_policy else moved).double().requires_grad_()
        return Answer(now, m.double(), reward, n == LIMIT, value.double())

    return [list(map(answer, rs, ns)) for rs, ns in zip(REWARDS, LENGTHS, strict=True)]


# ------------------------------------------------------------------------ the papers, written here from their formulas

Loss = Callable[[Answer, list[float]], list[Tensor]]
"""(completion, its tokens' advantages) -> loss of each token."""


def clipped(low: float, high: float) -> Loss:
    def loss(o: Answer, a: list[float]) -> list[Tensor]:
        r = [(x - y).exp() for x, y in zip(o.l, o.m, strict=True)]
        return [-torch.minimum(x * A, x.clamp(1 - low, 1 + high) * A) for x, A in zip(r, a, strict=True)]

    return loss


def standardised(rewards: list[float]) -> list[float]:
    centre = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((r - centre) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - centre) / deviation if deviation else 0.0 for r in rewards]


def centred(rewards: list[float]) -> list[float]:
    return [r - sum(rewards) / len(rewards) for r in rewards]


def over_batch(advantages: list[list[list[float]]]) -> list[list[list[float]]]:
    """All tokens' advantages to mean 0 and standard deviation 1."""
    flat = [x for group in advantages for one in group for x in one]
    centre = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - centre) ** 2 for x in flat) / len(flat))
    return [[[(x - centre) / deviation for x in one] for one in group] for group in advantages]


def outcome(
    rollout: Rollout, rule: Callable[[list[float]], list[float]], reward: Callable[[Answer], float] = lambda o: o.reward
) -> list[list[list[float]]]:
    """The advantage of each token of each completion of each group: that of the whole completion."""
    found = []
    for group in rollout:
        found.append([[a] * o.n for o, a in zip(group, rule([reward(o) for o in group]), strict=True)])
    return found


def reduced(rollout: Rollout, advantages: list[list[list[float]]], loss: Loss, how: str) -> Tensor:
    """The sum of all tokens' losses, each divided as a paper divides."""
    n_tokens, n_answers = sum(o.n for g in rollout for o in g), sum(len(g) for g in rollout)
    total = torch.zeros((), dtype=torch.float64)
    for group, of_one in zip(rollout, advantages, strict=True):
        for o, a in zip(group, of_one, strict=True):
            by = {"tokens": n_tokens, "each": n_answers * o.n, "budget": n_answers * LIMIT, "sum": n_answers}[how]
            total = total + sum(loss(o, a)) / by
    return total


def useful(rollout: Rollout) -> Rollout:
    """DAPO, Eq. 11: neither all right nor all wrong."""
    return [group for group in rollout if len({o.reward for o in group}) > 1]


def soft_overlong(o: Answer) -> float:
    """DAPO, Eq. 13, the cache being the same share of the limit as 4096 of 20480."""
    cache = LIMIT * 4096 // 20480
    if o.n <= LIMIT - cache:
        return o.reward
    return o.reward + (((LIMIT - cache) - o.n) / cache if o.n <= LIMIT else -1)


def dapo(rollout: Rollout, loss: Loss) -> Tensor:
    return reduced(rollout, outcome(rollout, standardised, soft_overlong), loss, "tokens")


def gdpo(rollout: Rollout) -> Tensor:
    """GDPO: each reward standardised in its group, the weighted sum, and that over all completions of the batch."""
    summed = []
    for group in rollout:
        of_parts = {name: standardised([o.parts[name] for o in group]) for name in WEIGHTS}
        summed.append([sum(w * of_parts[name][i] for name, w in WEIGHTS.items()) for i in range(len(group))])
    flat = [a for group in summed for a in group]
    centre = sum(flat) / len(flat)
    deviation = math.sqrt(sum((a - centre) ** 2 for a in flat) / len(flat))
    advantages = [
        [[(a - centre) / deviation] * o.n for o, a in zip(g, of_one, strict=True)]
        for g, of_one in zip(rollout, summed, strict=True)
    ]
    return reduced(rollout, advantages, PPO, "each")


def gspo(rollout: Rollout) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for group in rollout:
        for o, a in zip(group, standardised([o.reward for o in group]), strict=True):
            s = ((o.l - o.m).sum() / o.n).exp()
            total = total - torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a) / len(group) / len(rollout)
    return total


def luspo(rollout: Rollout) -> Tensor:
    """GSPO's term of each completion times its length."""
    total = torch.zeros((), dtype=torch.float64)
    for group in rollout:
        for o, a in zip(group, standardised([o.reward for o in group]), strict=True):
            s = ((o.l - o.m).sum() / o.n).exp()
            total = total - o.n * torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a) / len(group) / len(rollout)
    return total


def gmpo(rollout: Rollout) -> Tensor:
    """Algorithm 1: sgn(A) times the minimum of sgn(A) log r and its clip to [-0.4, 0.4], token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for group in rollout:
        for o, a in zip(group, standardised([o.reward for o in group]), strict=True):
            side = math.copysign(1, a)
            log_r = side * torch.minimum(side * (o.l - o.m), (side * (o.l - o.m)).clamp(-0.4, 0.4))
            total = total - a * (log_r.sum() / o.n).exp() / len(group) / len(rollout)
    return total


def m2po(rollout: Rollout) -> Tensor:
    """Clip bounds e^-tau and e^tau such that the mean of min((l - m)^2, tau^2) over the harmful tokens is in budget."""
    advantages = outcome(rollout, standardised)
    harmful = [
        float((x - y).detach()) ** 2
        for group, of_one in zip(rollout, advantages, strict=True)
        for o, a in zip(group, of_one, strict=True)
        for x, y, A in zip(o.l, o.m, a, strict=True)
        if A * float((x - y).detach()) > 0
    ]
    within = [v for v in harmful if sum(min(v, w) for w in harmful) / len(harmful) < 0.04]
    tau = math.sqrt(max(within) - 1e-12)
    return reduced(rollout, advantages, clipped(1 - math.exp(-tau), math.exp(tau) - 1), "tokens")


def gae(rollout: Rollout, lam: float = 0.95) -> list[list[list[float]]]:
    def of(o: Answer) -> list[float]:
        following, a, found = 0.0, 0.0, []
        for t in reversed(range(o.n)):
            v = float(o.value[t])
            a = (o.reward if t == o.n - 1 else 0.0) + following - v + lam * a
            found.append(a)
            following = v
        return found[::-1]

    return [[of(o) for o in group] for group in rollout]


def cispo(o: Answer, a: list[float]) -> list[Tensor]:
    r = (o.l - o.m).exp().detach().clamp(max=5)
    return [-x * A * y for x, A, y in zip(r, a, o.l, strict=True)]


def sapo(o: Answer, a: list[float]) -> list[Tensor]:
    taus = [1.0 if A > 0 else 1.05 for A in a]
    r = (o.l - o.m).exp()
    return [-A * 4 / tau * torch.sigmoid(tau * (x - 1)) for x, A, tau in zip(r, a, taus, strict=True)]


def reinforce(o: Answer, a: list[float]) -> list[Tensor]:
    return [-A * y for A, y in zip(a, o.l, strict=True)]


def spo(o: Answer, a: list[float]) -> list[Tensor]:
    r = (o.l - o.m).exp()
    return [-(x * A - abs(A) * (x - 1) ** 2 / (2 * 12.5)) for x, A in zip(r, a, strict=True)]


def drpo(o: Answer, a: list[float]) -> list[Tensor]:
    r = (o.l - o.m).exp()
    return [-(x * A - abs(A) * mu * (x - 1) ** 2 / (2 * 12.5)) for x, A, mu in zip(r, a, o.m.exp(), strict=True)]


def dppo(o: Answer, a: list[float]) -> list[Tensor]:
    moved = (o.l.exp() - o.m.exp()).detach()
    kept = [(d <= 0.15) if A > 0 else (d >= -0.15) for d, A in zip(moved, a, strict=True)]
    r = (o.l - o.m).exp().detach().clamp(max=20)
    return [-A * x * k * y for A, x, k, y in zip(a, r, kept, o.l, strict=True)]


def leave_one_out(rewards: list[float]) -> list[float]:
    return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]


PPO = clipped(0.2, 0.2)
PAPERS: dict[str, Callable[[Rollout], Tensor]] = {
    "grpo": lambda o: reduced(o, outcome(o, standardised), PPO, "each"),
    "dr_grpo": lambda o: reduced(o, outcome(o, centred), PPO, "budget"),
    "dapo": lambda o: dapo(useful(o), clipped(0.2, 0.28)),
    "gdpo": gdpo,
    "gspo": gspo,
    "luspo": luspo,
    "gmpo": gmpo,
    "m2po": m2po,
    "cispo": lambda o: dapo(useful(o), cispo),
    "sapo": lambda o: reduced(o, outcome(o, standardised), sapo, "each"),
    "ppo": lambda o: reduced(o, over_batch(gae(o)), PPO, "tokens"),
    "rloo": lambda o: reduced(o, outcome(o, leave_one_out), reinforce, "sum"),
    "reinforce++": lambda o: reduced(o, over_batch(outcome(o, list)), PPO, "tokens"),
    "reinforce++_baseline": lambda o: reduced(o, over_batch(outcome(o, centred)), PPO, "tokens"),
    "spo": lambda o: reduced(o, outcome(o, centred), spo, "budget"),
    "dppo": lambda o: reduced(o, outcome(o, centred), dppo, "budget"),
    "drpo": lambda o: reduced(o, outcome(o, centred), drpo, "budget"),
}
ON_POLICY = ("rloo",)
"""What its paper writes for samples of the policy itself alone."""


# ------------------------------------------------------------------------------------------------------- the product's

SAMPLING = Sampling(samples=4, max_new_tokens=LIMIT)


def episode_of(group: int, sample: int, o: Answer) -> Episode:
    reason = "length" if o.cut else "stop"
    generation = Generation(torch.arange(1, o.n + 1), o.m.float(), reason, version=0)
    sequence = TokenSequence.of(torch.tensor([1, 2]), generation)
    return Episode(f"p{group}", sample, (), "", "", reason, SAMPLING, (o.n,), (sequence,))


def scored(rollout: Rollout) -> list[ScoredGroup]:
    return [
        ScoredGroup(
            Problem.of_text(f"p{i}", "?", ""),
            tuple(episode_of(i, j, o) for j, o in enumerate(group)),
            tuple(RewardResult(o.reward, o.parts, weights=WEIGHTS) for o in group),
        )
        for i, group in enumerate(rollout)
    ]


def with_method(name: str, **changes: object) -> Run:
    base = configure(tiny_run(), sampling=SAMPLING)
    return configure(base, **method_changes(base, name, changes, changes) | changes)


def gradients(run: Run, rollout: Rollout) -> list[Tensor]:
    """What the trainer would send back into each completion's log-probabilities, as one update."""
    components, groups = build(run), scored(rollout)
    groups = components.overlong(groups) if components.overlong else groups
    answers = dict(zip((s for g in groups for s in g.sequences), (o for g in rollout for o in g), strict=True))
    values = [o.value.float() for o in answers.values()]
    credits = components.credit(groups, values)
    batches = make_batches(groups, credits, replace(components.batch_config, updates=1))
    found = {s: torch.zeros(o.n) for s, o in answers.items()}
    for batch in batches:
        objective = of_batch(run.objective.loss, whole(batch, answers))
        for micro in batch.micro_batches:
            rows = [batch.credits[n].sequence for n in micro.row.unique_consecutive().tolist()]
            leaves = [answers[s].l.detach().float().requires_grad_() for s in rows]
            kept = torch.ones_like(micro.target, dtype=torch.bool)
            tokens = Tokens(torch.cat(leaves), micro.behavior_logp, micro.advantage, kept, micro.sequence)
            (objective(tokens).loss * micro.weight).sum().backward()
            found |= {s: leaf.grad for s, leaf in zip(rows, leaves, strict=True)}
    return list(found.values())


def whole(batch: Batch, answers: dict[TokenSequence, Answer]) -> Tokens:
    """All tokens of an optimiser batch, for what reads statistics of it."""
    parts = []
    for micro in batch.micro_batches:
        rows = [batch.credits[n].sequence for n in micro.row.unique_consecutive().tolist()]
        parts.append(micro.tokens(torch.cat([answers[s].l.detach().float() for s in rows])))
    return Tokens.cat(parts)


def test_every_method_has_its_paper_here():
    assert set(PAPERS) == set(METHODS)


@pytest.mark.parametrize("name", list(METHODS))
def test_the_gradient_of_a_batch_is_the_papers(name: str) -> None:
    rollout = drawn(on_policy=name in ON_POLICY)
    PAPERS[name](rollout).backward()
    wanted = [torch.zeros_like(o.l) if o.l.grad is None else o.l.grad for group in rollout for o in group]
    found = gradients(with_method(name), rollout)
    largest = max(float(w.abs().max()) for w in wanted)
    assert largest > 0
    for ours, papers in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), papers, rtol=2e-5, atol=1e-6 * largest)


def test_the_methods_are_not_each_others():
    rollout = drawn()
    found = {name: torch.cat(gradients(with_method(name), rollout)) for name in ("grpo", "dr_grpo", "dapo")}
    assert not any(torch.allclose(found[a], found[b], rtol=1e-2) for a, b in (("grpo", "dr_grpo"), ("grpo", "dapo")))


# ----------------------------------------------------------------------------------------------------- the command line


def begun(*arguments: str) -> tuple[Run, TrainOptions]:
    return overridden(recipe("smoke"), list(arguments), "drpo train smoke", TrainOptions)


def changed(name: str, given: Sequence[str] = (), **changes: object) -> Run:
    """The smoke recipe with a method, and options: those changed, and those given that change nothing."""
    smoke, options = recipe("smoke"), {key.replace("__", "."): value for key, value in changes.items()}
    return configure(smoke, **method_changes(smoke, name, options, {*given, *options}) | options)


def test_a_method_sets_all_that_it_is_and_what_an_option_names_stays():
    """Also where the option names the recipe's own value; and the constant follows the tokens that options allow."""
    run, _ = begun("--method", "GRPO", "--advantage", "mean", "--reduction", "Token_Mean", "--sampling.samples", "3")
    assert recipe("smoke").objective.advantage is mean and run.objective.advantage is mean
    assert run.objective.loss == PPOClip(0.2, 0.2) and run.objective.reduction is token_mean
    assert run == (changed("grpo", ["advantage"], reduction=token_mean, sampling__samples=3))
    assert changed("grpo").objective.advantage is zscore
    assert changed("Dr. GRPO", sampling__max_new_tokens=64).objective.reduction == Horizon(64)
    run = changed("ppo", sampling__samples=1)
    assert run.objective.critic == GAE() and run.objective.advantage is mean
    run = changed("dapo", critic=GAE(0.9))
    assert run.objective.critic == GAE(0.9) and run.objective.advantage is mean and not run.rollout.dynamic_sampling
    assert changed("dapo", ["overlong"]).rewards.overlong is None
    assert not changed("reinforce++", ["no_whiten"]).objective.whiten


def test_the_lines_say_what_was_set_what_options_changed_and_what_is_left_out():
    assert method_lines(changed("grpo", reduction=token_mean), "grpo") == [
        "method grpo, arXiv 2402.03300: --objective 'ppo(low=0.2, high=0.2)' --advantage zscore --reduction "
        "sequence_mean; by your options --reduction token_mean instead",
        "  without its KL to the initial model, 0.04: --reference-kl 0.04",
    ]


def left_out(name: str) -> str:
    """The option of what a method leaves out, and its value."""
    return find(name, 256).without.rpartition(": ")[2]


LEAVE_OUT = [name for name in METHODS if find(name, 256).without]


@pytest.mark.parametrize("name", LEAVE_OUT)
def test_what_a_method_leaves_out_is_said_as_an_option_with_its_value(name: str) -> None:
    option, value = left_out(name).split(" ")
    field = option.removeprefix("--").replace("-", "_")
    run = configure(changed(name), **{field: float(value)})
    assert value_of(run, field) == float(value) > value_of(changed(name), field) == 0


def test_the_page_says_what_each_method_leaves_out():
    (text,) = re.findall(r"^- \*\*KL to the initial model\*\*.*?(?=^- )", PAGE.read_text(), flags=re.M | re.S)
    said = re.findall(r"`([a-z+_]+)` `(--[a-z-]+ [0-9.e-]+)`", text)
    assert said == [(name, left_out(name)) for name in LEAVE_OUT]


@pytest.mark.slow
def test_the_doctor_and_a_comparison_take_a_method_as_train_does(monkeypatch, capsys):
    seen: list[Run] = []
    monkeypatch.setattr("drpo.cli.compare.prepare", lambda folder, runs: seen.extend(runs))
    monkeypatch.setattr("drpo.cli.compare._compare", lambda *_: 0)
    monkeypatch.setattr("drpo.cli.doctor.build", lambda run: seen.append(run) or build(changed("grop")))
    compare = ["compare", "smoke", "--method", "DAPO", "--seeds", "0", "1"]
    assert (
        cli.main(compare) == 0 and cli.main([*compare, "--advantage", "mean", "--objectives", "none", "spo(12.5)"]) == 0
    )
    assert capsys.readouterr().out.count("method DAPO, arXiv 2503.14476: --objective 'ppo(") == 2
    dapo = changed("dapo")
    assert [configure(run, name="smoke") for run in seen[:2]] == [configure(dapo, seed=seed) for seed in (0, 1)]
    assert [run.objective.loss for run in seen[2:4]] == [ImportanceSampling(), SPO(12.5)]
    assert {run.objective.advantage for run in seen[2:]} == {mean} and seen[-1].rollout.dynamic_sampling == 3
    assert cli.main(["doctor", "smoke", "--method", "reinforce++", "--no-whiten", "--quick"]) == 2
    assert seen[-1] == changed("reinforce++", ["no_whiten"])
    assert "by your options --no-whiten instead" in capsys.readouterr().out
    assert cli.main(["doctor", "smoke", "--method", "grop"]) == cli.main(["compare", "smoke", "--method", "grop"]) == 2
    assert capsys.readouterr().err.count("did you mean 'grpo'?") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", list(METHODS))
def test_what_the_line_says_is_the_method(name: str) -> None:
    """Its options, given one by one, make the same run."""
    run, _ = begun("--method", name)
    line = method_lines(run, name)[0].partition(": ")[2]
    words = [word.strip("'") for word in line.replace(", ", ",").split(" ")]
    assert begun(*words)[0] == run


def test_a_methods_name_as_an_objective_is_refused_with_the_options_that_it_is():
    for read in (lambda text: read_value("objective", text), parse_variant):
        for text, options in (
            ("grpo", "--objective 'ppo(low=0.2, high=0.2)' --advantage zscore --reduction sequence_mean"),
            ("Dr_GRPO(0.2)", "--advantage mean --reduction 'horizon(TOKENS)'"),
            ("REINFORCE++", "--advantage reward --whiten --reduction token_mean"),
        ):
            with pytest.raises(InputError) as refused:
                read(text)
            assert options in str(refused.value) and "--method " in str(refused.value)
    assert read_value("objective", "PPO(0.2, 0.28)") == PPOClip(0.2, 0.28)  # a loss as well as a method


def test_what_cannot_be_is_refused_in_a_line():
    refused: Sequence[tuple[Callable[[], object], str]] = (
        (lambda: changed("grop"), "unknown method 'grop'; did you mean 'grpo'?"),
        (lambda: changed("drpo(0.2)"), "--objective 'drpo(0.2)' sets the objective alone"),
        (lambda: changed("ppo", advantage=zscore), "advantage=zscore: with a critic advantages are GAE's"),
        (lambda: tiny_run(critic=GAE(), whiten=True), "whiten=True: a critic has its own"),
        (lambda: tiny_run(overlong=Shaped(9)), "overlong=shaped(9): a completion has at most 8 tokens"),
        (lambda: tiny_run(overlong=Shaped(), advantage=maxrl), "overlong=shaped: with it rewards may be negative"),
        (lambda: read_value("overlong", "shaped(0)"), "overlong cache=0: must be a whole number of tokens >= 1"),
        (lambda: read_value("overlong", "shaped(2, -1)"), "overlong penalty=-1: must be a number above 0"),
        (lambda: read_value("overlong", "msak"), "unknown overlong 'msak'; did you mean 'mask'?"),
    )
    for made, message in refused:
        with pytest.raises(InputError) as error:
            made()
        assert message in str(error.value)


def test_the_page_has_every_method_with_what_it_sets():
    table = dict(re.findall(r"^\| `([^`]+)` \| `(--objective [^`]+)` \|", PAGE.read_text(), flags=re.M))
    made = {name: described(find(name, 256)).replace("horizon(256)", "horizon(TOKENS)") for name in METHODS}
    assert table == made


def test_the_help_names_every_method():
    text = helps(TrainOptions)["method"]
    assert all(name in text for name in METHODS)


# ----------------------------------------------------------------------------------------------------------- long ones


def test_a_masked_completion_counts_in_its_group_and_is_not_trained():
    run = configure(with_method("grpo", overlong=mask), reduction=token_mean)
    rollout = drawn()
    answers = [o for group in rollout for o in group]
    kept = [o for o in answers if not o.cut]
    a = [x for group in outcome(rollout, standardised) for x in group]
    loss = sum(sum(PPO(o, x)) for o, x in zip(answers, a, strict=True) if not o.cut) / sum(o.n for o in kept)
    loss.backward()
    for o, ours in zip(answers, gradients(run, rollout), strict=True):
        wanted = torch.zeros(o.n, dtype=torch.float64) if o.cut else o.l.grad
        torch.testing.assert_close(ours.double(), wanted, rtol=2e-5, atol=0 if o.cut else 1e-7)


@pytest.mark.parametrize("critic", [None, GAE(lam=1.0, whiten=False)])
def test_length_costs_reward_at_the_end_besides_what_the_task_gave(critic: GAE | None) -> None:
    (group, *_) = scored(drawn())
    (shaped,) = Shaped(4, penalty=0.5)([group], LIMIT)
    wanted = [0.0, -0.5, -0.375, 0.0]  # of 3, 10, 9 and 1 tokens, where the last 4 of 10 cost
    assert torch.equal(shaped.rewards, group.rewards)
    assert [r.parts["overlong"] for r in shaped.results] == [sum(r.penalties) for r in shaped.results] == wanted
    values = [torch.zeros(n) for n in LENGTHS[0]]
    found = [c.advantage for c in credit_rule(lambda rewards: rewards, critic)([shaped], values)]
    whole = [r + w for r, w in zip(REWARDS[0], wanted, strict=True)]
    assert all(torch.equal(a, torch.full_like(a, r)) for a, r in zip(found, whole, strict=True))


def test_a_penalty_adds_to_those_of_tokens():
    (group, *_) = scored(drawn())
    result = RewardResult(1.0, {"right": 1.0}, penalties=(-0.1,) * 10)
    (shaped,) = Shaped(4)([replace(group, episodes=group.episodes[1:2], results=(result,))], LIMIT)
    assert shaped.results[0].penalties == (*(-0.1,) * 9, -1.1) and shaped.results[0].parts["right"] == 1.0


def metrics_of(folder: Path, run: Run) -> Sequence[dict]:
    train(run, folder, keep_model=False)
    assert load_run(folder) == run
    return read_records(folder / METRICS)


@pytest.mark.parametrize("name", ["dapo", "mask"])
def test_a_run_counts_what_length_cost(tmp_path: Path, name: str) -> None:
    base = few_run(steps=1, eval_problems=0)
    run = configure(base, overlong=mask) if name == "mask" else configure(base, **method_changes(base, name, {}, ()))
    metrics, records = metrics_of(tmp_path, run), read_records(tmp_path / ROLLOUTS)
    cut = [sum(r["finish_reason"] == "length" for r in records if r["step"] == m["step"]) for m in metrics]
    assert all(cut)  # the untrained model rarely ends by itself
    if name == "mask":
        assert [m["overlong_masked"] for m in metrics] == cut
        assert all(("advantage" in r) == (r["finish_reason"] != "length") for r in records)
    else:
        assert [m["overlong_punished"] for m in metrics] >= cut
        assert all(m["reward_parts/overlong"] < 0 for m in metrics)
        assert all(r["reward_penalties"][-1] == -1 for r in records if r["finish_reason"] == "length")


def test_a_name_in_the_methods_module_needs_no_run():
    assert find("Reinforce++-baseline", 8).whiten and find("dapo", 8).overlong == Shaped()
