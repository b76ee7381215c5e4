"""Environments of OpenEnv as tasks, without its server (`make test-envs`)."""

import pickle
from pathlib import Path

import pytest

from drpo.environments.libraries.openenv import OpenEnv, default_parse, default_render
from drpo.errors import InputError
from drpo.spec import parse_spec
from drpo.tasks import REGISTRY
from drpo.types.environment import StepResult, Turn
from envs.training import ten_steps

pytestmark = pytest.mark.envs
pytest.importorskip("openenv")
COUNTER = "envs.openenv_counter:Counter"


def turn(text: str) -> Turn:
    return Turn(text, (), "stop")


def test_an_episode_with_the_default_texts() -> None:
    task = parse_spec(f"openenv('{COUNTER}')", REGISTRY)
    assert isinstance(task, OpenEnv) and pickle.loads(pickle.dumps(task)) == task
    problem, same = task.sample(1, 0, 0)[0], task.sample(1, 0, 0)[0]
    assert problem == same and problem.prompt.startswith('{"total": 0, "goal": ')
    goal = int(problem.prompt.rstrip("}").split()[-1])
    episode = task.open(problem, seed=0)
    assert episode.reset().messages == problem.messages
    wrong = episode.step(turn("many"))
    assert wrong.failed_calls == 1 and wrong.messages[0]["content"].startswith("Error: amount: ") and not wrong.done
    step = episode.step(turn('I add:\n```json\n{"amount": 2}\n```'))
    assert step.messages[0]["content"] == f'{{"total": 2, "goal": {goal}}}' and step.reward == 0
    assert episode.step(turn(str(goal - 2))) == StepResult(reward=1.0, done=True)


def test_functions_of_ones_own_render_and_parse() -> None:
    task = OpenEnv(COUNTER, render="envs.openenv_counter:shown", parse="envs.openenv_counter:read")
    problem = task.held_out(1)[0]
    assert problem.prompt.startswith("0 of ")
    episode = task.open(problem, seed=0)
    episode.reset()
    assert episode.step(turn("ab")).messages[0]["content"].startswith("2 of ")


def test_the_rules_of_the_default_texts() -> None:
    from envs.openenv_counter import Add, Note, Said

    assert default_render(Said(text="hello")) == "hello"
    assert default_parse("42", Note) == Note(text="42") and default_parse("42", Add) == Add(amount=42)
    for text, message in (("{}", "amount: Field required"), ('{"n": 1}', "amount"), ("[1]", "amount")):
        with pytest.raises(ValueError, match=message):
            default_parse(text, Add)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'envs.openenv_counter:None'", "cannot be imported"),
        ("'fractions:Fraction'", "fractions:Fraction is no openenv.core.Environment"),
        ("'envs.openenv_counter:Untyped'", "does not say its class of actions; add action='module:Class'"),
        (f"'{COUNTER}', turns=0", "turns=0 must be an integer from 1 to 1024"),
        (f"'{COUNTER}', render='envs.openenv_counter'", "must name a function, as 'module:function'"),
        ("'envs.openenv_counter:Closed'", "does not start: closed today"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        parse_spec(f"openenv({arguments})", REGISTRY)
    assert "\n" not in str(raised.value)


def test_ten_steps_of_training(tmp_path: Path) -> None:
    task = OpenEnv(COUNTER, turns=4, render="envs.openenv_counter:shown", parse="envs.openenv_counter:read")
    ten_steps(task, tmp_path)
