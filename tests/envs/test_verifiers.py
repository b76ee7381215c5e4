"""Tasksets of verifiers as tasks (`make test-envs`)."""

import pickle
from pathlib import Path

import pytest

from drpo.environments.libraries.verifiers import Verifiers
from drpo.errors import InputError
from drpo.spec import format_spec, parse_spec, runs_code
from drpo.tasks import REGISTRY
from drpo.types import Problem
from drpo.types.environment import StepResult, Turn
from envs.training import ten_steps

pytestmark = pytest.mark.envs
pytest.importorskip("verifiers")
ADD = '<tool_call>{"name": "adder_add", "arguments": {"a": 2, "b": 5}}</tool_call>'


@pytest.fixture(autouse=True, scope="module")
def tasksets_importable() -> object:
    """Here, and in the processes of tool servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        yield


def play(task: Verifiers, problem: Problem, *said: str) -> tuple[Problem, list[StepResult]]:
    episode, results = task.open(problem, seed=0), []
    observation = episode.reset()
    for text in said:
        results.append(episode.step(Turn(text, (), "stop")))
        if results[-1].done:
            break
    episode.close()
    return Problem("", observation.messages, "", {"tools": observation.tools}), results


def test_a_tool_is_called_and_the_taskset_scores() -> None:
    task = parse_spec("verifiers('verifiers_sums:SumTaskset', turns=3)", REGISTRY)
    assert runs_code(format_spec(task, REGISTRY))  # so that a folder that names it is not trusted
    assert isinstance(task, Verifiers) and pickle.loads(pickle.dumps(task)) == task
    problem = task.held_out(3)[2]
    opening, (told, end) = play(task, problem, ADD, "It is 7.")
    assert opening.messages == problem.messages == ({"role": "user", "content": "What is 2 + 5?"},)
    assert [t["function"]["name"] for t in opening.data["tools"]] == ["adder_add"]
    assert told.messages == ({"role": "tool", "name": "adder_add", "content": "7"},)
    assert told.calls[0]["function"]["arguments"] == {"a": 2, "b": 5} and not told.done
    assert end == StepResult(reward=1.0, done=True)
    assert play(task, problem, "It is 8.")[1] == [StepResult(reward=0.0, done=True)]


def test_wrong_calls_are_told_and_the_last_turn_is_scored() -> None:
    task = Verifiers("verifiers_sums:SumTaskset", turns=3)
    problem = task.held_out(3)[2]
    _, (unknown, told, last) = play(task, problem, ADD.replace("adder_add", "sub"), ADD, f"7 = {ADD}")
    assert unknown.messages[0]["content"] == "Error: there is no tool 'sub'" and told.messages[0]["content"] == "7"
    assert last.done and last.reward == 1
    _, (refused,) = play(task, problem, ADD.replace('"a": 2, ', ""))
    assert "rror" in refused.messages[0]["content"] and not refused.done
    assert play(task, problem, "<tool_call>add</tool_call>")[1] == [StepResult(done=True, failed_calls=1)]


def test_finite_tasksets_are_split_and_drawn_without_replacement() -> None:
    task = Verifiers("verifiers_sums:SumTaskset", holdout=3)
    aside = {p.data["index"] for p in task.held_out(9)}
    drawn = [p.data["index"] for step in range(2) for p in task.sample(7, step, seed=0)]
    assert aside == {0, 1, 2} and set(drawn[:7]) == set(drawn[7:]) == set(range(3, 10)) and drawn[:7] != drawn[7:]
    assert len(Verifiers("verifiers_sums:SumTaskset").held_out(9)) == 5


def test_an_environment_plays_the_user_and_an_endless_taskset_goes_on() -> None:
    task = Verifiers("verifiers_riddles:RiddleTaskset", environment="verifiers_riddles:RiddleEnv", turns=4)
    assert [p.data["index"] for p in task.held_out(99)] == list(range(64))
    assert [p.data["index"] for p in task.sample(2, 1, 0)] == [66, 67]
    opening, (first, second) = play(task, task.held_out(1)[0], "3", "0")
    assert opening.messages[0] == {"role": "system", "content": "Say a number."}
    assert first.messages == ({"role": "user", "content": "lower"},) and second == StepResult(reward=1.0, done=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("answer", "rewrote the conversation"), ("second", "rewrote the conversation"), ("raise", "no riddle today")],
)
def test_an_episode_that_cannot_be_trained_on_fails_in_one_line(fault: str, message: str) -> None:
    task = Verifiers("verifiers_riddles:RiddleTaskset", config={"fault": fault})
    with pytest.raises(RuntimeError, match=message) as raised:
        play(task, task.held_out(1)[0], "5", "5")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("verifiers('no_such_taskset:Nothing')", "cannot be loaded: .*no_such_taskset"),
        ("verifiers('verifiers_sums:SumTaskset', config={'pace': 3})", "cannot be loaded: .*pace"),
        ("verifiers('verifiers_sums:SumTaskset', turns=0)", "turns=0 must be an integer from 1 to 1024"),
        ("verifiers('verifiers_sums:SumTaskset', holdout=-1)", "holdout=-1 must be an integer from 0"),
        ("verifiers('verifiers_sums')", "taskset='verifiers_sums' must name a class, as 'module:Class'"),
        ("verifiers('verifiers_sums:Sums')", "the module's taskset is SumTaskset, not Sums"),
        ("verifiers('verifiers_sums:SumTaskset', environment='x')", "environment='x' must name a class"),
        ("verifiers('verifiers_boxed:BoxedTaskset')", "need a container"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        parse_spec(spec, REGISTRY)
    assert "\n" not in str(raised.value)


def test_ten_steps_of_training(tmp_path: Path) -> None:
    ten_steps(Verifiers("verifiers_riddles:RiddleTaskset", turns=3), tmp_path)
