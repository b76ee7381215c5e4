"""The doctor: checks that a run's numbers are sound on this machine. A check reports a figure, a budget and advice."""

from collections.abc import Iterator
from dataclasses import replace

from drpo.doctor import distribution, episodes, machine, scoring, sync, tokens
from drpo.doctor.cores import by_others, core_times
from drpo.doctor.finding import Finding, Verdict
from drpo.doctor.probe_batch import ProbeBatch, at_temperature, gather
from drpo.doctor.prompt import prompt
from drpo.doctor.size import QUICK, THOROUGH, Size
from drpo.environments.rewards import turns_say_all
from drpo.model.routing import RoutingMismatch, routing_mismatch
from drpo.rollout import TransformersEngine
from drpo.tasks import sample_unseen
from drpo.train.config import Run
from drpo.train.divergence import exact_divergence
from drpo.train.memory import StepShape
from drpo.train.setup import Components


def examine(run: Run, components: Components, size: Size = THOROUGH) -> Iterator[Finding]:
    """Yield the finding of each check; weights, optimiser and random state are left unchanged.

    Args:
        run: the run.
        components: built from the run, untrained.
        size: the size of the examination.
    """
    policy, driver = components.policy, replace(components.driver, environments=None)  # one turn of each episode
    stop = sorted(driver.stop)
    problems = sample_unseen(run.data.task, (), max(size.prompts, size.answers), 0, run.seed, components.fits)
    # Short completions suffice: their quality does not matter here.
    longest = min(size.new_tokens, run.rollout.sampling.max_new_tokens)
    sampling = replace(run.rollout.sampling, samples=size.samples, max_new_tokens=longest)
    driver.engine.load_weights(policy.state(), version=0)

    def look(temperature: float, prompts: int) -> ProbeBatch:
        settings = replace(sampling, temperature=temperature)
        return gather(policy, driver, problems[:prompts], settings, run.seed)

    batch = look(run.rollout.sampling.temperature, size.prompts)
    group = [c for c in batch.completions if c.problem_id == batch.completions[0].problem_id]
    first = distribution.ratio(batch.tokens, batch.entropy, run.objective.loss)
    yield first
    lengths = [c.n_sampled for c in batch.completions]
    yield distribution.alignment(lengths, batch.behavior_logp, batch.plain)
    yield distribution.draws(batch)
    yield distribution.support(batch)
    if run.rollout.sampling.temperature != 1:
        yield distribution.temperature(batch)
    elif size.slow_too:  # temperature 1 hides a missing scale
        with at_temperature(policy, 0.6):
            other = look(0.6, max(2, size.prompts // 2))
        yield distribution.temperature(other)
        yield replace(distribution.draws(other), check="draws at 0.6")
    yield prompt(components.tokenizer, stop, problems[0])
    yield tokens.stops(batch, stop, components.tokenizer, sampling.max_new_tokens)
    yield tokens.round_trip(policy, batch, problems[: size.prompts], components.tokenizer)
    yield from episodes.examine(run, components, size)
    usual = float((batch.logp - batch.behavior_logp).abs().mean())
    short = replace(sampling, samples=2, max_new_tokens=min(8, sampling.max_new_tokens))
    yield sync.canary(policy, driver, problems, short, usual)
    if size.slow_too:
        vocab_size = len(policy.model.get_output_embeddings().weight)
        whole = driver.run(problems[:2], replace(short, top_logprobs=vocab_size), ("doctor", run.seed))
        with at_temperature(policy, run.rollout.sampling.temperature):
            yield distribution.divergence(exact_divergence(policy, [e for group in whole for e in group]))
        if (mismatch := _routing(components, batch)) is not None:
            yield distribution.routing(mismatch)
    yield machine.paths(policy, group[:2], with_gradient=size.slow_too)
    yield machine.region(run.objective.loss, first.values["prob_diff_p99"])
    longest = max(len(c.sequence.prompt_ids) for c in batch.completions)
    shape = StepShape.of(run, longest)
    yield machine.memory(policy, components.optimizer, shape, components.critic)
    if components.reward is not turns_say_all:  # there is an answer to score
        yield from scoring.reward(components.reward, problems[: size.answers], run.rewards.pool)


def examine_and_watch(run: Run, components: Components, size: Size = THOROUGH) -> Iterator[Finding]:
    """Yield what `examine` does, then a note if other programs used the cores meanwhile."""
    began = core_times()
    yield from examine(run, components, size)
    busy = by_others(began, core_times())
    if busy is not None:
        yield busy


def _routing(components: Components, batch: ProbeBatch) -> RoutingMismatch | None:
    """Compare the routing if the sampler is a mixture of experts in this process; else None."""
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


__all__ = ["QUICK", "THOROUGH", "Finding", "Size", "Verdict", "examine", "examine_and_watch"]
