"""Checks of whole episodes, sampled as in training: their signal, and what several turns add."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from drpo.doctor import environment, signal, turns
from drpo.doctor.environment import Replay, SeedsRead, replay, scripted
from drpo.doctor.finding import Finding
from drpo.doctor.recording import RecordingEngine, Sampled
from drpo.doctor.size import Size
from drpo.doctor.template import Exchange, template
from drpo.rewards import RewardPool
from drpo.rollout import Environments
from drpo.rollout.native_calls import native_calls
from drpo.rollout.tools import with_tools
from drpo.train.config import Run
from drpo.train.score import score
from drpo.train.setup import Components, environments_of
from drpo.types import Episode, Problem, ScoredGroup
from drpo.types.environment import Observation, StepResult, ToolSchema, Turn

_REPLAYED = 2
"""Problems whose episodes are played again."""

_IDS = 16
"""Ids of a problem, for each of two seeds of a run, that show what an environment's hidden state depends on."""


@dataclass(frozen=True, eq=False)
class _Attempt:
    problem: Problem
    episode: Episode
    turns: Sequence[Sampled]


def examine(run: Run, components: Components, size: Size) -> Iterator[Finding]:
    """Yield the findings on turns, environments and chat template, where the run has any, and that on the signal.

    Args:
        run: the run.
        components: built from it; the engine has the policy's weights.
        size: of the examination.
    """
    environments = components.driver.environments
    engine = RecordingEngine(components.driver.engine)
    driver = replace(components.driver, engine=engine)
    sampling, key = replace(run.rollout.sampling, top_logprobs=0), ("doctor", "signal", run.seed)
    with_signal = sampling.max_new_tokens <= size.longest
    if not with_signal:
        sampling = replace(sampling, samples=2, max_new_tokens=min(sampling.max_new_tokens, size.longest))

    def draw(part: int) -> list[ScoredGroup]:
        problems = run.data.task.sample(signal.FIRST, part, run.seed)
        groups = score(problems, driver.run(problems, sampling, key), pool)
        return components.overlong(groups) if components.overlong else groups

    if environments is None and not with_signal:
        return
    with environments or nullcontext(), RewardPool(components.reward, run.rewards.pool) as pool:
        first = draw(0)
        if environments is not None:
            attempts = [_Attempt(g.problem, e, engine.turns_of(key, e)) for g in first for e in g.all_episodes]
            ids = turns.turn_tokens([a.episode for a in attempts], [a.turns for a in attempts])
            yield ids
            if ids.verdict == "broken":
                return  # what follows would be of other tokens, or fail
            yield from _of_turns(run, components, environments, attempts, size)
        if with_signal:
            credit = None if run.objective.critic else components.credit
            groups = signal.sampled(lambda part: draw(part) if part else first, credit)
            yield signal.signal(list(groups), credit)


def _of_turns(
    run: Run, components: Components, environments: Environments, attempts: Sequence[_Attempt], size: Size
) -> Iterator[Finding]:
    tokenizer, driver = components.tokenizer, components.driver
    episodes = [a.episode for a in attempts]
    yield turns.turns(components.policy, episodes)
    chosen = _longest(attempts)
    script = _Script(tokenizer, [a for a in chosen for _ in range(2)])
    first, again = (replay(environments, script.problems, script) for _ in range(2))
    yield environment.environment(first, again)
    yield environment.group(first, _seeds_read(run, environments, tokenizer, chosen[0]) if size.slow_too else None)
    yield template(
        tokenizer,
        _exchange(tokenizer, first),
        driver.stop,
        branches=sum(max(0, len(e.sequences) - 1) for e in episodes),
        turns=sum(max(0, len(e.turns) - 1) for e in episodes),
    )


def _longest(attempts: Sequence[_Attempt]) -> list[_Attempt]:
    """Return the attempts of most turns, each at another problem."""
    ordered = sorted(attempts, key=lambda a: len(a.turns))
    by_problem = {a.problem.id: a for a in ordered}
    return sorted(by_problem.values(), key=lambda a: -len(a.turns))[:_REPLAYED]


class _Script:
    """The turns of some attempts, and further ones; see `replay`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, attempts: Sequence[_Attempt]) -> None:
        self._tokenizer, self._attempts = tokenizer, attempts

    @property
    def problems(self) -> list[Problem]:
        return [a.problem for a in self._attempts]

    def __call__(self, number: int, observation: Observation) -> list[Turn]:
        ended = [t for t in self._attempts[number].turns if t.generation.finish_reason == "stop"]
        _, tools = with_tools(self._tokenizer, observation)
        return [*(self._turn(t, tools) for t in ended), *scripted(observation)]

    def _turn(self, sampled: Sampled, tools: Sequence[ToolSchema]) -> Turn:
        ids, before = sampled.generation.token_ids.tolist(), sampled.request.prompt_ids.tolist()
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        calls = native_calls(self._tokenizer, ids, tools, before) if tools else ()
        return Turn(text, tuple(ids), sampled.generation.finish_reason, calls)


def _seeds_read(
    run: Run, environments: Environments, tokenizer: PreTrainedTokenizerBase, attempt: _Attempt
) -> SeedsRead:
    script = _Script(tokenizer, [attempt] * _IDS)
    problems = [replace(problem, id=f"doctor-{i}") for i, problem in enumerate(script.problems)]
    others = environments_of(run.data.task, replace(run, seed=run.seed + 1))
    assert others is not None
    with others:
        of_another_seed = replay(others, problems, script)
    return SeedsRead.of(replay(environments, problems, script), of_another_seed)


def _exchange(tokenizer: PreTrainedTokenizerBase, played: Replay) -> Exchange:
    """The first exchange of turns in which an environment replied."""
    for observation, *results in played.answers:
        for result in results:
            if isinstance(observation, Observation) and isinstance(result, StepResult) and result.messages:
                messages, tools = with_tools(tokenizer, observation)
                return Exchange(messages, tools, result.messages, result.calls)
    return Exchange(({"role": "user", "content": "what?"},))
