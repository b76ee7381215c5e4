"""What the doctor says of runs in environments: of ids, log-probabilities, templates, environments and groups."""

import importlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import pytest
import torch

from drpo.doctor import Finding, Size, episodes
from drpo.doctor.environment import Replay, environment
from drpo.doctor.recording import RecordingEngine, Sampled
from drpo.environments.local import LocalEnvironments
from drpo.environments.tools import Tools
from drpo.tasks import Addition
from drpo.train.config import Run, configure
from drpo.train.setup import Components, build
from drpo.types import Generation, Problem, Request
from drpo.types.calls import Call
from drpo.types.environment import Observation, StepResult
from planted import all_replacements
from support.environments import TEMPLATE, Chat, Chatting, talkative
from support.rollouts import with_engine
from support.worlds import tiny_run

SIZE = Size(prompts=4, samples=4, new_tokens=16, answers=4, slow_too=True)
SMALL = replace(SIZE, samples=2, slow_too=False)
CHECKS = ["turn tokens", "turns", "environment", "group", "template", "signal"]


def chat_run(**changes: object) -> Run:
    return tiny_run(**{"task": Chat(), "sampling.max_new_tokens": 12, **changes})


def findings(run: Run, components: Components | None = None, size: Size = SIZE) -> dict[str, Finding]:
    return {f.check: f for f in episodes.examine(run, components or talkative(run), size)}


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_sound_run_has_no_fault(template: str | None) -> None:
    run = chat_run()
    found = findings(run, talkative(run, template))
    assert list(found) == CHECKS and {f.verdict for f in found.values()} == {"ok"}, found
    values = found["turns"].values
    assert all(abs(values[f"ratio_turn_{turn}"] - 1) < 1e-4 for turn in (1, 2, 3))
    assert found["group"].values["seed_matters"] and not found["group"].values["shared"]


PLANTED = {
    "a turn is decoded and encoded again": ("turn tokens", "not those that were sampled"),
    "the stop token of a turn is not trained": ("turn tokens", "were sampled|are not those"),
    "the glue between turns is trained": ("turn tokens", "trained that the model did not sample"),
    "the mask of sampled tokens is off by one": ("turn tokens", "left out of training|did not sample"),
    "all groups have the same hidden state": ("group", "all problems have the same hidden state"),
    "each sample of a problem has a hidden state of its own": ("group", "play different games"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_found_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug, (check, said) = all_replacements()[name], PLANTED[name]
    *path, last = bug.target.partition(":")[2].split(".")
    owner = reduce(getattr, path, importlib.import_module(bug.module))
    monkeypatch.setattr(owner, last, bug.make(getattr(owner, last)))
    found = findings(chat_run(), size=SIZE if check == "group" else SMALL)
    assert found[check].verdict == "broken" and re.search(said, found[check].advice), found[check]


class OfAnother(RecordingEngine):
    """Reads the end of a conversation alone from the second turn on."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return super().generate(
            [replace(r, prompt_ids=r.prompt_ids[-6:], after=None) if len(r.key) > 5 else r for r in requests]
        )

    def turns_of(self, key: object, episode: object) -> list[object]:
        raise AssertionError("the doctor records by itself")


def test_a_later_turn_with_other_log_probabilities_is_found() -> None:
    run = chat_run()
    components = talkative(run)
    found = findings(run, with_engine(components, OfAnother(components.driver.engine)))
    assert found["turn tokens"].verdict == "ok"
    assert found["turns"].verdict == "broken" and "from turn 2 on" in found["turns"].advice
    assert found["turns"].values["gap_turn_1"] < 1e-4 < found["turns"].values["gap_turn_2"]


def test_a_model_that_ends_no_turn_is_a_note() -> None:
    run = chat_run()
    components = build(run)
    never = replace(components.driver, stop=frozenset())
    found = findings(run, replace(components, driver=never), SMALL)["turns"]
    assert found.verdict == "note" and "came to a second turn" in found.figure


@dataclass(frozen=True)
class Forgetful(Chat):
    """Its seeds are its own."""

    def open(self, problem: Problem, seed: int) -> Chatting:
        return Chatting(self, problem, next(COUNT))


COUNT = itertools.count()


@dataclass(frozen=True)
class Shy(Chat):
    """Does not answer."""

    def open(self, problem: Problem, seed: int) -> Chatting:
        raise RuntimeError("not today")


def test_environments_that_depend_on_something_else_or_fail() -> None:
    found = findings(chat_run(task=Forgetful()), size=SMALL)
    assert found["environment"].verdict == found["group"].verdict == "broken"
    assert "its replies depend on more" in found["environment"].advice
    found = findings(chat_run(task=Shy()), size=SMALL)
    assert found["environment"].verdict == "broken" and "not today" in found["environment"].advice


def test_a_slow_step_is_a_note() -> None:
    one = Replay(((Observation(()), StepResult(done=True)),), (1.5,))
    assert environment(one, one).verdict == "note"


DROPS = TEMPLATE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
REFUSES = TEMPLATE.replace("<{{ m.role }}>", "{{ raise_exception('no tools') if m.role == 'tool' }}<{{ m.role }}>")


@pytest.mark.parametrize(
    ("template", "role", "verdict", "said"),
    [
        (TEMPLATE, "tool", "note", "rendered anew for a further turn"),
        (REFUSES.replace(" if m.role != 'tool'", " if true"), "tool", "broken", "refuses a reply of role tool"),
        (DROPS, "user", "note", "leaves it out"),
    ],
    ids=["branches", "refuses", "drops thinking"],
)
def test_templates(template: str, role: str, verdict: str, said: str) -> None:
    run = chat_run(task=Chat(role=role))
    found = findings(run, talkative(run, template), SMALL)["template"]
    assert found.verdict == verdict and said in found.advice, found
    assert (found.values["branches"] > 0) == (said == "rendered anew for a further turn")


def test_a_turn_is_played_again_with_its_calls_in_the_templates_form() -> None:
    run = configure(chat_run(task=Addition()), environment=Tools("support.environments:double"))
    tokenizer = build(run).tokenizer
    tokenizer.chat_template = (
        "{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<tool_call><function={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}"
        "<parameter={{ k }}>{{ v }}</parameter>{% endfor %}</function></tool_call>{% endfor %}{% endfor %}"
    )
    problem = Problem.of_text("0", "?", "")
    said = "<tool_call><function=double><parameter=x>2</parameter></function></tool_call>"
    ids = torch.tensor(tokenizer(said)["input_ids"])
    request = Request(ids[:1], run.rollout.sampling, frozenset(), (0, "0", 0), "completion 0")
    sampled = Sampled(request, Generation(ids, torch.zeros(len(ids)), "stop", 0))
    script = episodes._Script(tokenizer, [episodes._Attempt(problem, None, [sampled])])  # type: ignore[arg-type]
    turn, *_ = script(0, Tools("support.environments:double").open(problem, seed=0).reset())
    assert turn.tool_calls == (Call("double", {"x": 2}),)


def test_tools_are_called_in_the_script() -> None:
    tools = Tools("support.environments:double")
    run = configure(chat_run(task=Addition()), environment=tools)
    components = talkative(run)
    here = replace(components.driver, environments=LocalEnvironments(tools))  # starting a process takes seconds
    found = findings(run, replace(components, driver=here), SMALL)
    assert found["environment"].verdict == "ok" and found["group"].values["pairs"] == 2
