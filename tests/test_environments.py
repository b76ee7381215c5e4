"""The environments that ship: what they answer, what earns a reward, that evaluation is set aside."""

import json
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from drpo.environments import make
from drpo.environments.calculator import Calculator
from drpo.environments.contract import Environment, EnvironmentTask
from drpo.environments.games import Guess, Walk, WordGame
from drpo.environments.lookup import Lookup
from drpo.environments.repair import Repair
from drpo.environments.sandbox import python
from drpo.environments.tools import MOST_CHARACTERS, ToolEpisode, Tools, by_name, tool_schema
from drpo.errors import InputError
from drpo.types import Problem
from drpo.types.environment import StepResult, Turn

ALL: dict[str, EnvironmentTask] = {
    "calculator": Calculator(),
    "three factors": Calculator(3, 3),
    "guess": Guess(),
    "walk": Walk(),
    "word game": WordGame(),
    "lookup": Lookup(),
    "repair": Repair(),
}


def play(task: EnvironmentTask, problem: Problem, *said: str) -> list[StepResult]:
    environment = task.open(problem, seed=0)
    assert environment.reset().messages == problem.messages
    return [environment.step(Turn(text, (), "stop")) for text in said]


@pytest.mark.parametrize("name", ALL)
def test_problems_are_functions_of_their_arguments_and_evaluation_is_set_aside(name: str) -> None:
    task = ALL[name]
    drawn = task.sample(20, step=3, seed=1)
    assert drawn == ALL[name].sample(20, step=3, seed=1) != task.sample(20, step=4, seed=1)
    aside = task.held_out(50)
    assert len({p.id for p in [*drawn, *aside]}) == len(drawn) + len(aside)
    if name != "guess":  # of ten numbers none is left
        said = {(p.prompt, p.answer) for p in aside}
        assert not said & {(p.prompt, p.answer) for p in drawn}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("said", ["", "\x00\u202e", "7" * 9000, "<calc>9**9**9</calc>", "<tool_call>", "```python\n("])
def test_nothing_that_a_model_says_breaks_one(name: str, said: str) -> None:
    task = ALL[name]
    (result,) = play(task, task.sample(1, step=0, seed=0)[0], said)
    assert result.reward == 0 and (result.done or result.messages)


def test_a_product_by_the_calculator() -> None:
    task = Calculator()
    problem = task.sample(1, step=0, seed=0)[0]
    a, b = (int(word.strip("?")) for word in problem.prompt.split() if word.strip("?").isdigit())
    asked, right = play(task, problem, f"I use <calc>{a} * {b}</calc>", f"It is {a * b}.")
    assert asked.messages[0]["content"] == f"Result: {a * b}" and not asked.done
    assert right == StepResult(reward=1.0, done=True)
    assert play(task, problem, f"It is {a * b + 1}.")[0] == StepResult(reward=0.0, done=True)


def test_three_factors_take_one_operation_at_a_time() -> None:
    task = Calculator(2, 3)
    refused, fine = play(task, task.sample(1, 0, 0)[0], "<calc>2 * 3 * 4</calc>", "<calc>6 * 4</calc>")
    assert refused.failed_calls == 1 and fine.messages[0]["content"] == "Result: 24"


def test_bisection_finds_every_number_in_four_guesses() -> None:
    task = Guess(1, 10)
    for problem in task.held_out(10):
        environment, low, high = task.open(problem, 0), 1, 10
        for _ in range(task.max_turns):
            result = environment.step(Turn(str((low + high) // 2), (), "stop"))
            if result.done:
                break
            low, high = (
                ((low + high) // 2 + 1, high)
                if result.messages[0]["content"] == "higher"
                else (low, (low + high) // 2 - 1)
            )
        assert result == StepResult(reward=1.0, done=True)


def test_a_walk_arrives() -> None:
    task = Walk(distance=3)
    for problem in task.sample(30, 0, 0):
        (x, y), (goal_x, goal_y) = problem.data["start"], problem.data["goal"]
        ways = ["east" if goal_x > x else "west"] * abs(goal_x - x) + ["north" if goal_y > y else "south"] * abs(
            goal_y - y
        )
        assert 1 <= len(ways) <= 3
        *before, last = play(task, problem, *ways)
        assert last == StepResult(reward=1.0, done=True) and all(r.messages and not r.done for r in before)


def test_two_lookups_lead_to_the_answer() -> None:
    task = Lookup()
    for problem in task.held_out(10):
        who = problem.prompt.removeprefix("In which valley does ").removesuffix(" work?")
        call = '<tool_call>{"name": "search", "arguments": {"query": "%s"}}</tool_call>'
        (first,) = play(task, problem, call % who)
        town = (
            next(line for line in first.messages[0]["content"].split('"') if who in line).split(" in ")[-1].strip(".")
        )
        (second,) = play(task, problem, call % f"{town} town valley")
        assert f"{town} is a town in the valley of {problem.answer}." in second.messages[0]["content"]
        assert task.reward(problem, f"In {problem.answer}.") == 1.0  # type: ignore[arg-type]


def test_a_repaired_program_earns_its_reward_and_a_broken_one_is_told_its_tests() -> None:
    task = Repair()
    problem = task.held_out(1)[0]
    broken, right = play(task, problem, problem.prompt, f"```python\n{problem.answer}```")
    assert "These tests fail:\nassert mean([1, 2]) == 1.5" in broken.messages[0]["content"] and not broken.done
    assert right == StepResult(reward=1.0, done=True)


def grow(text: str, times: int = 2) -> str:
    """Repeat a text.

    Args:
        text: what to repeat.
        times: how often.
    """
    return text * times


def test_calls_that_cannot_be_run_are_answered_with_what_was_wrong() -> None:
    episode = ToolEpisode(Problem.of_text("0", "?", ""), by_name([grow]))
    said = [
        ('{"name": "grow", "arguments": {"text": "ab"}}', "abab", 0),
        ('{"name": "shrink"}', "Error: there is no tool 'shrink'; there are grow", 1),
        ('{"name": "grow", "arguments": {"txt": 1}}', "Error: grow: missing a required argument: 'text'", 1),
        ('{"name": "grow", "arguments": {"text": "a", "times": "b"}}', "Error: TypeError: can't multiply", 1),
        ("{", "Error: the call is not JSON", 1),
        ('{"name": "grow", "arguments": {"text": "a", "times": 99999}}', "cut: 99,999 characters", 0),
    ]
    for body, told, failed in said:
        result = episode.step(Turn(f"<tool_call>{body}</tool_call>", (), "stop"))
        assert told in result.messages[0]["content"] and result.failed_calls == failed and not result.done
        assert len(result.messages[0]["content"]) < MOST_CHARACTERS + 100
    assert episode.step(Turn("It is abab.", (), "stop")).done


def test_programs_run_in_the_sandbox_and_their_output_is_told() -> None:
    try:
        python("1")
    except InputError as refused:
        pytest.skip(str(refused))
    episode = Tools("python").open(Problem.of_text("0", "?", ""), seed=0)
    said = [
        ("print(1)\nimport sys; print('two', file=sys.stderr)\n3", "1\ntwo\n3\n"),
        ("def f(x):\n    return 1 / x\nf(0)", 'File "program.py", line 2, in f\n    return 1 / x'),
        ("x = (", "SyntaxError: '(' was never closed"),
        ("print('\u00e9' * 9000)", "... (cut: more than 4,000 bytes)"),
        ("import os; os._exit(3)", "Error: the program did not end"),
        ("open('/tmp/x', 'w')", "Read-only file system"),
        ("None", "(nothing was printed)"),
    ]
    for code, told in said:
        call = json.dumps({"name": "python", "arguments": {"code": code}})
        (message,) = episode.step(Turn(f"<tool_call>{call}</tool_call>", (), "stop")).messages
        assert told in message["content"] and len(message["content"]) < 4100


async def later(x: int) -> int:
    """Return a number.

    Args:
        x: the number.
    """
    return x


SHAPELESS = partial(grow, "a")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (5, "5 is no function"),
        ("statistics", "'statistics' is no function"),
        (f"{__name__}:SHAPELESS", "is no function"),
        (f"{__name__}:later", "is a coroutine or a generator; a tool returns its result"),
    ],
)
def test_what_is_no_tool_is_refused_in_one_line(function: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Tools(function)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:\n", "invalid syntax (mistaken_tools.py, line 1)"),
        ("import sys\n\nsys.exit(3)\n", "SystemExit: 3 (mistaken_tools.py, line 3)"),
        ("def f():\n    return P\n\nf()\n", "NameError: name 'P' is not defined (mistaken_tools.py, line 2)"),
    ],
)
def test_a_module_with_a_mistake_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.delitem(sys.modules, "mistaken_tools", raising=False)
    (tmp_path / "mistaken_tools.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=re.escape(f"cannot be imported: {said}")):
        Tools("mistaken_tools:f")


@pytest.mark.parametrize("turns", [0, True, "3", None])
def test_a_number_of_turns_is_a_whole_number(turns: Any) -> None:
    with pytest.raises(InputError, match=f"max_turns={turns!r} must be a whole number of at least 1"):
        make(_Endless(turns))


@dataclass
class _Endless:
    max_turns: Any
    in_process: bool = True

    def open(self, problem: Problem, seed: int) -> Environment:
        raise NotImplementedError


def test_a_tool_without_a_docstring_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="a tool needs a docstring"):
        tool_schema(lambda x: x)
    with pytest.raises(InputError, match="two have one name"):
        by_name([grow, grow])


@pytest.mark.parametrize("name", ["unnamed", "many"])
def test_a_tool_whose_arguments_have_no_names_in_a_call_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError, match=f"tool {name!r}: the model names every argument in a call, and .*x: int"):
        Tools(f"{__name__}:{name}")


def unnamed(x: int, /) -> int:
    """Return a number.

    Args:
        x: the number.
    """
    return x


def many(*x: int) -> int:
    """Return how many there are.

    Args:
        x: numbers.
    """
    return len(x)
