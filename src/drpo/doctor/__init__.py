"""The doctor: is what this machine would train on sound? A line per check: its figure, its budget, a remedy."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from drpo.doctor import distribution, machine, scoring, signal, sync, tokens
from drpo.doctor.finding import Finding, Verdict
from drpo.doctor.probe_batch import ProbeBatch, at_temperature, gather
from drpo.model.routing import RoutingMismatch, routing_mismatch
from drpo.rewards import RewardPool
from drpo.rollout import TransformersEngine
from drpo.tasks import sample_unseen
from drpo.train.config import Run
from drpo.train.divergence import exact_divergence
from drpo.train.score import score
from drpo.train.setup import Components
from drpo.types import ScoredGroup


@dataclass(frozen=True)
class Size:
    """How much is looked at.

    Args:
        prompts, samples, new_tokens: of the completions that the numbers are judged on.
        answers: problems that the reward is tried on.
        slow_too: whether the slower checks are made too: another temperature, the exact divergence, a mixture's
            routing, gradients.
        longest: `max_new_tokens` up to which it is looked at whether groups carry a signal: that takes completions as
            long as training has them.
    """

    prompts: int
    samples: int
    new_tokens: int
    answers: int
    slow_too: bool
    longest: int = 2**20


THOROUGH = Size(prompts=8, samples=8, new_tokens=32, answers=32, slow_too=True)
QUICK = Size(prompts=4, samples=8, new_tokens=32, answers=8, slow_too=False, longest=256)


def examine(run: Run, components: Components, size: Size = THOROUGH) -> Iterator[Finding]:
    """Yield what each check finds; the weights, the optimiser and the random numbers stay as they are.

    Args:
        run: what is to be trained.
        components: made from it, untrained.
        size: how much to look at.
    """
    policy, driver = components.policy, components.driver
    stop = sorted(driver.stop)
    problems = sample_unseen(run.data.task, (), max(size.prompts, size.answers), 0, run.seed, components.fits)
    # Short completions are enough: how well they answer does not matter here.
    longest = min(size.new_tokens, run.rollout.sampling.max_new_tokens)
    sampling = replace(run.rollout.sampling, samples=size.samples, max_new_tokens=longest)
    driver.engine.load_weights(policy.state(), version=0)

    def look(temperature: float, prompts: int) -> ProbeBatch:
        how = replace(sampling, temperature=temperature)
        return gather(policy, driver, problems[:prompts], how, run.seed)

    batch = look(run.rollout.sampling.temperature, size.prompts)
    group = [c for c in batch.completions if c.problem_id == batch.completions[0].problem_id]
    first = distribution.ratio(batch, run.objective.loss)
    yield first
    yield distribution.alignment(batch)
    yield distribution.draws(batch)
    yield distribution.support(batch)
    if run.rollout.sampling.temperature != 1:
        yield distribution.temperature(batch)
    elif size.slow_too:  # at temperature 1 nothing shows, and nothing is wrong before somebody changes it
        with at_temperature(policy, 0.6):
            other = look(0.6, max(2, size.prompts // 2))
        yield distribution.temperature(other)
        yield replace(distribution.draws(other), check="draws at 0.6")
    yield tokens.stops(batch, stop, components.tokenizer, sampling.max_new_tokens)
    yield tokens.round_trip(policy, batch, problems[: size.prompts], components.tokenizer)
    if run.objective.critic is None and run.rollout.sampling.max_new_tokens <= size.longest:
        yield signal.signal(_sampled_groups(run, components), run.objective.advantage)
    usual = float((batch.logp - batch.behavior_logp).abs().mean())
    short = replace(sampling, samples=2, max_new_tokens=min(8, sampling.max_new_tokens))
    yield sync.canary(policy, driver, problems, short, usual)
    if size.slow_too:
        vocab_size = len(policy.model.get_output_embeddings().weight)
        whole = driver.run(problems[:2], replace(short, top_logprobs=vocab_size), ("doctor", run.seed))
        with at_temperature(policy, run.rollout.sampling.temperature):
            yield distribution.divergence(exact_divergence(policy, [e for group in whole for e in group]))
        if (found := _routing(components, batch)) is not None:
            yield distribution.routing(found)
    yield machine.paths(policy, group[:2], with_gradient=size.slow_too)
    yield machine.region(run.objective.loss, first.values["prob_diff_p99"])
    longest = max(len(c.sequence.prompt_ids) for c in batch.completions)
    yield machine.memory(
        policy,
        group,
        micro_batch_tokens=run.trainer.micro_batch_tokens,
        rows=run.data.prompts * run.rollout.sampling.samples,
        row_tokens=longest + run.rollout.sampling.max_new_tokens,
        critic=None if components.critic is None else components.critic.critic,
    )
    yield from scoring.reward(components.reward, problems[: size.answers], run.rewards.pool)


def _sampled_groups(run: Run, components: Components) -> list[ScoredGroup]:
    """A few groups as training will have them, scored."""
    sampling = replace(run.rollout.sampling, top_logprobs=0)

    def draw(part: int) -> list[ScoredGroup]:
        problems = run.data.task.sample(signal.FIRST, part, run.seed)
        return score(problems, components.driver.run(problems, sampling, ("doctor", "signal", run.seed)), pool)

    with RewardPool(components.reward, run.rewards.pool) as pool:
        return list(signal.sampled(draw, run.objective.advantage))


def _routing(components: Components, batch: ProbeBatch) -> RoutingMismatch | None:
    """Compared where the sampler is a model in this process, and a mixture of experts."""
    if not isinstance(components.driver.engine, TransformersEngine):
        return None
    lengths = [len(c.sequence.token_ids) for c in batch.completions]
    return routing_mismatch(
        components.driver.engine.model,
        components.policy.model,
        [e.sequence for e in batch.completions],
        trainer_dtype=components.policy.dtype,
        logp=batch.logp.split(lengths),
    )


__all__ = ["QUICK", "THOROUGH", "Finding", "Size", "Verdict", "examine"]
