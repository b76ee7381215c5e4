"""GEM, TextArena and skyrl-gym as tasks, each in an environment of its own (`make test-envs`)."""

import pickle
import random
from pathlib import Path

import pytest

from drpo.environments.contract import EnvironmentTask
from drpo.environments.libraries.gem import Gem
from drpo.environments.libraries.skyrl_gym import SkyrlGym
from drpo.environments.libraries.textarena import TextArena
from drpo.errors import InputError
from drpo.spec import format_spec, parse_spec
from drpo.tasks import REGISTRY
from drpo.types import Problem
from drpo.types.environment import StepResult, Turn
from envs.players import Guessing
from envs.training import ten_steps

pytestmark = pytest.mark.envs
for library in ("gem", "textarena", "skyrl_gym"):
    pytest.importorskip(library)

GAMES = (
    "gem('game:GuessTheNumber-v0-easy')",
    "gem('game:Game2048-v0-easy')",
    "gem('game:Minesweeper-v0-easy')",
    "gem('game:Sudoku-v0-easy')",
    "textarena('GuessTheNumber-v0')",
    "textarena('2048-v0')",
    "textarena('Blackjack-v0')",
    "textarena('Bandit-v0')",
    "textarena('FrozenLake-v0-random')",
)
SAID = ("\\boxed{5} [5]", "\\boxed{up} [up]", "\\boxed{reveal 1 1} [red]", "[hit]", "", "[stand] \\boxed{left}", "\x00")


def turn(text: str) -> Turn:
    return Turn(text, (), "stop")


def play(task: EnvironmentTask, problem: Problem, *said: str, noise: bool = False) -> list[StepResult]:
    episode = task.open(problem, seed=0)
    assert episode.reset().messages == problem.messages
    results: list[StepResult] = []
    for text in said:
        if noise:
            random.seed(len(results))
        results.append(episode.step(turn(text)))
        if results[-1].done:
            break
    episode.close()
    return results


@pytest.mark.parametrize("spec", GAMES)
def test_an_episode_is_a_function_of_its_problem_and_its_turns(spec: str) -> None:
    """Even where other code, or another episode in between, draws from the process's random numbers."""
    task = parse_spec(spec, REGISTRY)
    problem, other = task.sample(2, step=3, seed=1)
    alone = play(task, problem, *SAID)  # type: ignore[arg-type]
    assert alone == play(task, problem, *SAID, noise=True)  # type: ignore[arg-type]
    assert all(r.messages or r.done for r in alone)
    together = [task.open(p, seed=0) for p in (problem, other)]  # type: ignore[attr-defined]
    for episode in together:
        episode.reset()
    for text, result in zip(SAID, alone, strict=False):
        assert together[0].step(turn(text)) == result
        together[1].step(turn(text)) if text else None
        random.random()


@pytest.mark.parametrize("spec", GAMES)
def test_evaluation_has_seeds_of_its_own_and_a_spec_gives_the_task_back(spec: str) -> None:
    task = parse_spec(spec, REGISTRY)
    assert parse_spec(format_spec(task, REGISTRY), REGISTRY) == task == pickle.loads(pickle.dumps(task))
    drawn, aside = task.sample(20, step=0, seed=0), task.held_out(20)
    assert drawn == task.sample(20, step=0, seed=0) and len({p.data["seed"] for p in drawn}) == 20
    assert not {p.data["seed"] for p in drawn} & {p.data["seed"] for p in aside}
    assert [p.data["seed"] for p in drawn] != [p.data["seed"] for p in task.sample(20, step=1, seed=0)]


@pytest.mark.parametrize(
    ("task", "guess"), [(Gem("game:GuessTheNumber-v0-easy"), "\\boxed{%d}"), (TextArena("GuessTheNumber-v0"), "[%d]")]
)
def test_bisection_wins(task: EnvironmentTask, guess: str) -> None:
    for problem in task.held_out(4):
        episode = task.open(problem, seed=0)
        episode.reset()
        low, high = 1, 10 if isinstance(task, Gem) else 20
        for _ in range(5):
            result = episode.step(turn(guess % ((low + high) // 2)))
            if result.done:
                break
            hint = result.messages[0]["content"]
            assert ("higher" in hint) != ("lower" in hint)
            low, high = ((low + high) // 2 + 1, high) if "higher" in hint else (low, (low + high) // 2 - 1)
        assert result == StepResult(reward=1.0, done=True)


def test_a_player_of_textarena_reads_what_is_new_alone() -> None:
    task = TextArena("GuessTheNumber-v0", system="Be brief.")
    problem = task.held_out(1)[0]
    wrong, again = play(task, problem, "no number", "[21]")[0], play(task, problem, "[0]", "[0]")
    assert problem.messages[0]["content"] == "Be brief."
    assert wrong.failed_calls == 1 and "invalid move" in wrong.messages[0]["content"]
    assert "no number" not in wrong.messages[0]["content"] and "You are playing" not in wrong.messages[0]["content"]
    assert again[-1].done and again[-1].failed_calls == 1


def test_skyrl_gym_plays_the_rows_of_a_task() -> None:
    task = parse_spec("skyrl_gym('gsm8k_multi_turn', 'addition', turns=3)", REGISTRY)
    assert isinstance(task, SkyrlGym) and task.max_turns == 3
    problem = task.sample(1, step=0, seed=0)[0]
    none, wrong, right = play(task, problem, "no", "#### 0", f"#### {problem.answer}")
    assert none.reward == 0 and wrong.reward == pytest.approx(0.2 / 3) and right == StepResult(reward=1.0, done=True)
    assert "#### ANSWER" in none.messages[0]["content"]
    assert play(task, problem, "no", "no", "no")[-1].done


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gem('game:GuessTheNumber-v1-easy')", "did you mean 'game:GuessTheNumber-v0-easy'"),
        ("gem('x')", r"unknown environment 'x'; gem.print_envs\(\) lists"),
        ("gem('game:GuessTheNumber-v0-easy', turns=0)", "turns=0 must be an integer from 1 to 1024"),
        ("gem('game:Wordle-v0-easy')", "the game of seed 0 does not start: .*words"),
        ("textarena('Go-Fish')", r"unknown game 'Go-Fish'; textarena.pprint_registry_detailed\(\) lists"),
        ("textarena('TicTacToe-v0')", "does not start: The number of players has to be 2"),
        ("textarena('GuessTheNumber-v0', arguments={'lowest': 1})", "unexpected keyword argument 'lowest'"),
        ("skyrl_gym('gsm9k', 'addition')", "did you mean 'gsm8k'"),
        ("skyrl_gym('gsm8k', 'additio')", "did you mean 'addition'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(spec: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=message) as raised:
        parse_spec(spec, REGISTRY)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "task",
    [
        Guessing("game:GuessTheNumber-v0-easy"),
        TextArena("Bandit-v0", turns=4),
        SkyrlGym("gsm8k_multi_turn", "addition", 3),
    ],
)
def test_ten_steps_of_training(task: EnvironmentTask, tmp_path: Path) -> None:
    ten_steps(task, tmp_path)
