"""The doctor finds each fault and names it, and says nothing of a sound set-up."""

import copy
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drpo import doctor
from drpo.cli import main
from drpo.credit.gae import GAE
from drpo.doctor import Finding, Size, machine, scoring, sync, tokens
from drpo.doctor.cores import CoreTimes, by_others, core_times
from drpo.doctor.mutation import mutate
from drpo.objectives import DRPO
from drpo.recipes.addition import smoke
from drpo.rewards import Reward, exact_number, in_process
from drpo.rollout import EpisodeDriver, TransformersEngine, decode
from drpo.tasks import Addition
from drpo.train.config import Run, configure
from drpo.train.loop import train
from drpo.train.setup import Components, build
from drpo.types import Generation, Problem, Request
from support.rollouts import with_engine
from support.runs import assert_same_run
from support.tiny_world import STOPS, completion, own_logp
from support.worlds import sampling

SIZE = Size(prompts=6, samples=8, new_tokens=16, answers=8, slow_too=True)
LITTLE = Size(prompts=2, samples=2, new_tokens=8, answers=2, slow_too=True)
LEAST = replace(LITTLE, slow_too=False, longest=1)
WITHOUT_SIGNAL = replace(SIZE, longest=1)
"""What rewards there are takes most of the time, and is no fault of an engine."""


def a_run(temperature: float = 1.0, **changes: object) -> Run:
    settings = sampling(max_new_tokens=16, temperature=temperature)
    run = configure(smoke(), sampling=settings, precision="fp32", rollout_precision="fp32", task=Addition(1, 50))
    return configure(run, **changes)


class Wrapped:
    """An engine that does something else than it should."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return self.engine.generate(requests)

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        self.engine.load_weights(state, version)

    def close(self) -> None:
        self.engine.close()


class Otherwise(Wrapped):
    """Samples by another distribution than it is asked to, and may report the log-probabilities of yet another."""

    def __init__(self, engine: TransformersEngine, reported: float | None = None, **settings: float) -> None:
        super().__init__(engine)
        self.settings, self.reported = settings, reported

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        drawn = self.engine.generate([replace(r, sampling=replace(r.sampling, **self.settings)) for r in requests])
        if self.reported is None:
            return drawn
        return [replace(g, behavior_logp=self._logp(r, g)) for r, g in zip(requests, drawn, strict=True)]

    def _logp(self, r: Request, g: Generation) -> Tensor:
        told = completion(g.token_ids.tolist(), prompt_ids=r.prompt_ids.tolist())
        return own_logp(self.engine.model, told, self.reported)


class Shifted(Wrapped):
    """Log-probabilities stand one token further on."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        drawn = self.engine.generate(requests)
        return [replace(c, behavior_logp=c.behavior_logp.roll(1)) for c in drawn]


class Deaf(Wrapped):
    """Stamps the version and keeps the old weights, all of them or some."""

    def __init__(self, engine: TransformersEngine, kept: Callable[[str], bool] = lambda name: True) -> None:
        super().__init__(engine)
        self.kept = kept

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        own = {name: p.clone() for name, p in self.engine.model.named_parameters()}
        self.engine.load_weights({n: own[n] if self.kept(n) else value for n, value in state.items()}, version)


class StaleHead(Wrapped):
    """Gives new weights to the embedding and not to the head that is tied to it, as vLLM 0.32 does on a CPU."""

    def __init__(self, engine: TransformersEngine) -> None:
        super().__init__(engine)
        engine.model.lm_head.weight = torch.nn.Parameter(engine.model.lm_head.weight.clone(), requires_grad=False)

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        self.engine.load_weights({**state, "lm_head.weight": self.engine.model.lm_head.weight.clone()}, version)


class WarmCache(Wrapped):
    """Reads a prompt that it has seen with the weights that it had then."""

    def __init__(self, engine: TransformersEngine) -> None:
        super().__init__(engine)
        self.seen: dict[tuple[int, ...], torch.nn.Module] = {}

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        drawn: list[Generation] = []
        new = self.engine.model
        for prompt, same in groupby(requests, key=lambda r: tuple(r.prompt_ids.tolist())):
            old = self.seen.setdefault(prompt, copy.deepcopy(new))
            self.engine._decoder = lambda prompts, samples, old=old: half_old(old, new, prompts, samples)
            drawn += self.engine.generate(list(same))
        return drawn


def half_old(
    old: torch.nn.Module, new: torch.nn.Module, prompts: Sequence[Tensor], samples: int
) -> decode.PlainDecoder:
    """The prompts' keys and values by old weights, and everything after by new ones."""
    with torch.inference_mode():
        decoder = decode.PlainDecoder(old, prompts, samples)
        decoder.model = new
    return decoder


class WrongEOS(Wrapped):
    """Ends where another token is drawn."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return self.engine.generate([replace(r, stop=frozenset({77})) for r in requests])


@in_process
def credulous(problem: Problem, text: str) -> float:
    """An answer that it cannot read must be right."""
    return exact_number(problem, text) if any(c.isdigit() for c in text) else 1.0


@in_process
def generous(problem: Problem, text: str) -> float:
    return float(any(c.isdigit() for c in text))


@in_process
def signless(problem: Problem, text: str) -> float:
    """The sign is lost."""
    return exact_number(replace(problem, answer=problem.answer.lstrip("-")), text.replace("-", ""))


@in_process
def severe(problem: Problem, text: str) -> float:
    return exact_number(problem, text) if int(problem.answer) % 2 else 0.0


def components_of(run: Run) -> Components:
    """With EOS tokens that a random model draws often enough."""
    components = build(run)
    components.policy.model.generation_config.eos_token_id = sorted({0, *STOPS})
    engine = TransformersEngine(components.policy.model)
    return replace(components, driver=EpisodeDriver.of(engine, components.policy.model, components.tokenizer))


@dataclass(frozen=True)
class Fault:
    """How it is planted in sound parts, the check that must find it, and what it must say."""

    plant: Callable[[Components], Components]
    check: str
    said: str
    temperature: float = 1.0
    size: Size = WITHOUT_SIGNAL


def engine_of(make: Callable[[TransformersEngine], object]) -> Callable[[Components], Components]:
    return lambda components: with_engine(components, make(components.driver.engine))


def otherwise(reported: float | None = None, **settings: float) -> Callable[[Components], Components]:
    return engine_of(lambda engine: Otherwise(engine, reported, **settings))


def deaf(part: str) -> Callable[[Components], Components]:
    return engine_of(lambda engine: Deaf(engine, lambda name: part in name))


def trained_at(temperature: float) -> Callable[[Components], Components]:
    def plant(components: Components) -> Components:
        components.policy.temperature = temperature
        return components

    return plant


RAW = "the engine's log-probabilities are those of temperature 1"
TOP_K = "top-k 20: .*generation_config"
PART = "a part of them is stale"
FAULTS = {
    "log-probabilities are not at the temperature": Fault(otherwise(1.0), "temperature", RAW, 0.7),
    "the same, where the run's temperature is 1": Fault(otherwise(1.0), "temperature", RAW),
    "the sampler knows no temperature": Fault(otherwise(temperature=1.0), "temperature", RAW, 0.7),
    "the same, and it says otherwise": Fault(otherwise(0.7, temperature=1.0), "draws", "the sampler is hotter", 0.7),
    "the trainer knows no temperature": Fault(trained_at(1.0), "temperature", RAW.replace("engine", "trainer"), 0.7),
    "top-p 0.9": Fault(otherwise(top_p=0.9), "support", r"top-p 0\.9"),
    "top-p 0.9, unconfessed": Fault(otherwise(1.0, top_p=0.9), "support", r"top-p 0\.9"),
    "top-k 20 of a generation_config": Fault(otherwise(top_k=20), "support", TOP_K),
    "top-k 20, unconfessed": Fault(otherwise(1.0, top_k=20), "support", TOP_K),
    "stale weights": Fault(deaf(""), "sync", "still samples with the old weights", size=LEAST),
    "a stale head": Fault(engine_of(StaleHead), "sync", PART, size=LEAST),
    "a stale layer": Fault(deaf("layers.0"), "sync", PART, size=LEAST),
    "a warm prefix cache": Fault(engine_of(WarmCache), "sync", "reset its prefix cache", size=LEAST),
    "a wrong EOS": Fault(engine_of(WrongEOS), "stops", "EOS"),
    "log-probabilities shifted by one token": Fault(engine_of(Shifted), "alignment", "shifted by one token"),
}


SLOW = pytest.mark.slow
ALIKE = ("top-p 0.9", "top-k 20, unconfessed")
"""Faults whose two halves others have: a top-p unconfessed, a top-k confessed."""


def broken(findings: Sequence[Finding]) -> dict[str, str]:
    return {f.check: f.advice for f in findings if f.verdict == "broken"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name in ALIKE else ()) for name in FAULTS])
def test_every_fault_is_found_and_named(name: str) -> None:
    fault = FAULTS[name]
    run = a_run(fault.temperature)
    findings = []
    for finding in doctor.examine(run, fault.plant(components_of(run)), fault.size):
        findings.append(finding)
        if finding.check == fault.check:
            break  # what comes after it is another fault's
    found = broken(findings)
    assert fault.check in found, (found, [f.figure for f in findings if f.check == fault.check])
    assert re.search(fault.said, found[fault.check]), found[fault.check]


@pytest.mark.parametrize(
    ("reward", "check", "said"),
    [
        (credulous, "reward", "holds no answer"),
        (generous, "reward", "answers of other problems"),
        (signless, "mutated", r"sign flipped\) scores 1 where the answer"),
        (severe, "reward", "the reference answer"),
    ],
)
def test_every_fault_of_a_reward_is_found_and_named(reward: Reward, check: str, said: str) -> None:
    found = broken(scoring.reward(reward, a_run().data.task.held_out(SIZE.answers)))
    assert re.search(said, found[check]), found


@pytest.mark.parametrize(
    ("temperature", "seed"),
    [(1.0, 1), (1.0, 2), (0.7, 0), (0.7, 1), (0.7, 2)],
)
@SLOW
def test_a_sound_set_up_passes(temperature: float, seed: int) -> None:
    run = a_run(temperature, seed=seed)
    assert broken(list(doctor.examine(run, components_of(run), SIZE))) == {}


def test_a_sound_set_up_passes_and_its_figures_are_there_for_programs() -> None:
    run = a_run(0.7, objective=DRPO(0.2))
    findings = list(doctor.examine(run, components_of(run), SIZE))
    assert broken(findings) == {}
    found = {f.check: f for f in findings}
    values = found["ratio"].values
    assert abs(values["ratio_mean"] - 1) < 1e-4 and 0 <= values["k3"] < 1e-6 and values["tokens"] > 200
    assert found["paths"].values["gradient"] < 1e-4
    assert found["reward"].values["gold"] == 1.0
    assert found["region"].verdict == "ok"
    assert machine.region(DRPO(12.5), values["prob_diff_p99"]).verdict == "note"  # a radius out of reach


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_no_false_alarm(seed: int) -> None:
    run = a_run(1.0, seed=seed, precision="auto", rollout_precision="auto")
    assert broken(list(doctor.examine(run, build(run), doctor.QUICK))) == {}


def test_a_model_of_few_positions_can_be_looked_at() -> None:
    """The prompts of the canary are as long as it can read."""
    components = components_of(a_run())
    limits = replace(components.driver.limits, positions=120, fixed=True)
    driver = replace(components.driver, limits=limits)
    problems = components.held_out or a_run().data.task.held_out(8)
    found = sync.canary(components.policy, driver, problems, sampling(samples=2, max_new_tokens=4), 0.0)
    assert found.verdict == "ok", found


@pytest.mark.parametrize("lora_rank", [pytest.param(0, marks=SLOW), 2])
def test_it_leaves_no_trace(tmp_path: Path, lora_rank: int) -> None:
    """Weights, adapters, optimiser, random numbers: the run after it is the run without it."""
    run = configure(a_run(), lora_rank=lora_rank, steps=1, eval_problems=2)
    examined = build(run)
    before = {n: p.clone() for n, p in examined.policy.trainable().items()}
    assert list(doctor.examine(run, examined, LITTLE))
    assert all(torch.equal(before[n], p) for n, p in examined.policy.trainable().items())
    assert examined.policy.dtype == torch.float32 and examined.policy.temperature == 1.0
    train(run, tmp_path / "examined", components=examined)
    train(run, tmp_path / "plain")
    assert_same_run(tmp_path / "examined", tmp_path / "plain")


def test_memory_counts_the_gradients_and_moments_of_a_critic(tmp_path: Path) -> None:
    """As many bytes as it then has when it has learnt."""
    run = a_run(steps=1, eval_problems=0)
    needs = {}
    for critic in (None, GAE()):
        examined = configure(run, critic=critic)
        components = components_of(examined)
        findings = {f.check: f for f in doctor.examine(examined, components, replace(LEAST, longest=16))}
        needs[critic is not None] = findings["memory"].values["need_bytes"]
        assert ("those of the critic" in findings["memory"].figure) == (critic is not None)
        assert findings["signal"].values["groups"] >= 8  # with a critic too
    train(examined, tmp_path, components=components, keep_model=False)
    parameters = components.critic.critic.trainable().values()
    held = [p.grad for p in parameters] + [v for p in parameters for v in components.critic.optimizer.state[p].values()]
    assert needs[True] - needs[False] == sum(v.nbytes for v in held if v.ndim > 0) > 0


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([CoreTimes(0, 0, 0), CoreTimes(10, 18, 5), *[CoreTimes(0, 0, 0)] * 2])
    monkeypatch.setattr(doctor, "core_times", lambda: next(times))
    assert main(["doctor", "smoke", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "other programs kept 1.3 cores busy" in said and "smoke is sound on this machine" in said
    assert main(["doctor", "smoke", "--quick", "--json", "--reward", "test_doctor:credulous"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["sound"]
    assert [f["check"] for f in said["findings"] if f["verdict"] == "broken"] == ["reward"]


def test_its_own_work_is_not_taken_for_anothers() -> None:
    began, spent = core_times(), time.process_time()
    while time.process_time() < spent + 0.2:
        pass
    ended = core_times()
    assert ended.own - began.own > 0.15 and ended.busy - began.busy > 0.15
    assert by_others(began, replace(ended, busy=began.busy + ended.own - began.own)) is None


@pytest.mark.usefixtures("without_pictures")
def test_a_broken_set_up_is_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sick = Finding("sync", "broken", "old", "new", "give it the new weights")
    monkeypatch.setattr(doctor, "examine", lambda run, components, size: iter([sick]))
    command = ["train", "smoke", "--steps", "1", "--plain"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 1
    said = capsys.readouterr().out
    assert "give it the new weights" in said and "not trained, because of sync" in said
    assert not (tmp_path / "a").exists()
    assert main([*command, "--out", str(tmp_path / "b"), "--no-doctor"]) == 0


@pytest.mark.parametrize(
    ("token_ids", "finish_reason", "said"),
    [
        ([5, 9, 5, 9], "stop", "continues after an EOS"),
        ([5, 5, 5], "stop", "its last token 5 is no EOS"),
        ([5, 5, 5], "length", "has 3 of 4 tokens"),
        ([5, 5, 5, 9], "length", "ends with 9"),
        ([5, 5, 9], "stop", None),
        ([5, 5, 5, 5], "length", None),
    ],
)
def test_ends_that_are_wrong(token_ids: list[int], finish_reason: str, said: str | None) -> None:
    found = tokens._wrong_end(
        replace(completion(token_ids), finish_reason=finish_reason), frozenset({9}), max_new_tokens=4
    )
    assert (found is None) == (said is None) and (said or "") in (found or "")


@pytest.mark.usefixtures("without_pictures")
def test_an_odd_reward_is_told_and_trained_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its author knows whether it is meant so."""
    odd = Finding("reward", "broken", "1 of 8", "0", "a text that holds no answer scores 1")
    monkeypatch.setattr(doctor, "examine", lambda run, components, size: iter([odd]))
    command = ["train", "smoke", "--steps", "1", "--plain"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert "holds no answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answers", "kinds"),
    [
        (["12", "12.0"], ["one more", "sign flipped", "digits swapped"] * 2),
        (["0", "0"], ["one more"] * 2),
        (["0.5", "1/2", "11"], ["one more", "sign flipped", "another's"] * 3),
        (["no", "on"], []),
        (["1,2", "(2,1)"], []),
        (["\\sqrt2", "\\sqrt{2}"], []),
        (["\\text{no solution}", "No solution"], []),
        (["11", "11\\text{ cm}^2", "11\\%"], ["one more", "sign flipped"] * 2),
        (["x+1", "", "x+2"], ["another's"] * 2),
        (["assert f(1) == 2", "assert f(2) == 3"], ["another's"] * 2),
    ],
)
def test_no_mutation_of_an_answer_is_right(answers: list[str], kinds: list[str]) -> None:
    made = mutate([Problem.of_text(str(i), "", answer) for i, answer in enumerate(answers)])
    assert [m.kind for m in made] == kinds
    assert all(exact_number(m.problem, m.answer) == 0 for m in made if "one more" in kinds)


def test_mutations_are_few() -> None:
    assert len(mutate([Problem.of_text(str(i), "", str(i + 10)) for i in range(1000)])) <= 32
