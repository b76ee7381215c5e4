"""Classes written for TRL's `environment_factory` as tasks; they need no TRL, which one test compares with."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from drpo.environments.libraries.trl import TrlEnvironment
from drpo.environments.tools import tool_schema
from drpo.errors import InputError
from drpo.spec import format_spec, parse_spec
from drpo.tasks import REGISTRY, Addition
from drpo.types import Problem
from drpo.types.environment import StepResult, Turn
from envs.players import Buying
from envs.shop import Shop
from envs.training import ten_steps


def play(task: TrlEnvironment, *said: str) -> tuple[Problem, list[StepResult]]:
    problem = task.sample(1, step=0, seed=0)[0]
    episode = task.open(problem, seed=0)
    episode.reset()
    return problem, [episode.step(Turn(text, (), "stop")) for text in said]


def call(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def test_an_episode_has_the_rows_problem_what_reset_says_and_the_public_methods_as_tools() -> None:
    task = TrlEnvironment("envs.shop:Shop", "addition")
    problem = task.sample(1, step=0, seed=0)[0]
    assert problem == Addition().sample(1, 0, 0)[0] and task.held_out(3) == Addition().held_out(3)
    observation = task.open(problem, seed=0).reset()
    assert observation.messages[-1]["content"] == f"{problem.prompt}\nYou have 3 coins."
    assert [t["function"]["name"] for t in observation.tools] == ["buy", "look"]
    assert observation.tools[0]["function"]["parameters"]["required"] == ["what"]


def test_calls_are_answered_and_the_reward_is_asked_for_once_at_the_end() -> None:
    _, (bought, seen, dear, end) = play(
        TrlEnvironment("envs.shop:Shop", "addition"),
        call("buy", '{"what": "tea"}'),
        call("look"),
        call("buy", '{"what": "gold", "coins": 9}'),
        "I have tea.",
    )
    assert bought.messages == ({"role": "tool", "name": "buy", "content": "You bought tea."},)
    assert seen.messages[0]["content"] == "{'coins': 2}"  # str(result), as TRL tells it
    assert dear.messages[0]["content"] == "Error: ValueError: you have 2 coins" and dear.failed_calls == 1
    assert end == StepResult(reward=1.0, done=True)


def test_the_last_turn_is_rewarded_even_where_it_calls_a_tool() -> None:
    _, (first, last) = play(TrlEnvironment("envs.shop:Shop", "addition", turns=2), *2 * [call("buy", '{"what": "x"}')])
    assert (first.reward, last.reward) == (0.0, 2.0)


def test_a_private_method_is_no_tool_and_the_row_is_what_trl_hands_over() -> None:
    _, (hidden,) = play(TrlEnvironment("envs.shop:Shop", "addition"), call("_count"))
    assert hidden.failed_calls == 1 and "there is no tool '_count'" in hidden.messages[0]["content"]
    task = TrlEnvironment("envs.shop:Unpaid", "addition")
    problem, (fields,) = play(task, call("look"))
    assert fields.messages[0]["content"] == "['answer', 'prompt']"
    assert task.reward(problem, f"It is {problem.answer}") == Addition().reward(problem, f"It is {problem.answer}")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "rows", "turns", "message"),
    [
        ("envs.shop:Nothing", "addition", 8, "trl_environment 'envs.shop:Nothing' cannot be imported"),
        ("envs.shop", "addition", 8, "environment='envs.shop' must name a class, as 'module:Class'"),
        ("fractions:Fraction", "addition", 8, r"has no reset\(\*\*row\)"),
        ("envs.shop:NoTool", "addition", 8, "no public method besides reset, so no tool"),
        ("envs.shop:Undocumented", "addition", 8, "tool 'buy': .*docstring"),
        ("envs.shop:Broken", "addition", 8, r"envs.shop:Broken\(\) cannot be made: the shop is closed"),
        ("envs.shop:Shop", "additions", 8, "unknown task 'additions'; did you mean 'addition'"),
        ("envs.shop:Shop", "guess", 8, "rows='guess' has environments of its own"),
        ("envs.shop:Shop", "addition", 0, "turns=0 must be an integer from 1 to 1024"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name: str, rows: str, turns: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        TrlEnvironment(name, rows, turns)
    assert "\n" not in str(raised.value)


def test_its_spec_gives_it_back() -> None:
    task = parse_spec("trl_environment('envs.shop:Shop', 'addition(1, 9)', turns=3)", REGISTRY)
    assert task == TrlEnvironment("envs.shop:Shop", "addition(1, 9)", 3)
    assert parse_spec(format_spec(task, REGISTRY), REGISTRY) == task


class Stop(Exception):  # noqa: N818 (no error: it ends the trainer)
    pass


@pytest.mark.envs
def test_trl_offers_the_same_tools_and_the_same_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from drpo.model import loading

    task = TrlEnvironment("envs.shop:Shop", "addition")
    problem = task.sample(1, step=0, seed=0)[0]
    observation = task.open(problem, seed=0).reset()
    row = {"prompt": [dict(m) for m in problem.messages], "answer": problem.answer}
    seen: dict[str, Any] = {}

    def generate(self: Any, prompts: Any) -> None:
        seen["prompts"], seen["environments"] = prompts, self.environments
        raise Stop

    monkeypatch.setattr(trl.GRPOTrainer, "_generate", generate)
    model, tokenizer = loading.tiny()
    tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text()
    settings = trl.GRPOConfig(
        str(tmp_path), per_device_train_batch_size=2, num_generations=2, use_cpu=True, report_to="none", max_steps=1
    )
    trainer = trl.GRPOTrainer(
        model,
        args=settings,
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=tokenizer,
        environment_factory=Shop,
    )
    with pytest.raises(Stop):
        trainer.train()
    assert [tool_schema(tool) for tool in trainer._env_tools[None]] == list(observation.tools)
    assert seen["prompts"] == [[dict(m) for m in observation.messages]] * 2
    assert {str(k): v for k, v in seen["environments"][0].row.items()} == row


@pytest.mark.envs
def test_ten_steps_of_training(tmp_path: Path) -> None:
    steps = ten_steps(Buying("envs.shop:Shop", "addition", turns=3), tmp_path)
    assert all(f["calls"] > 0 for f in steps) and max(f["reward_mean"] for f in steps) > 0
