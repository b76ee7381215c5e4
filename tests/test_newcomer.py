"""A new user with three data sets of their own: from `drpo init` to an evaluated result, in at most four commands.

Minutes each: `make test-slow`. How they end is printed; at least two of the three learn, and one that does not says so.
"""

import json
import time
from pathlib import Path

import pytest

import newcomer
import warm_start
from drpo.cli import COMMANDS
from drpo.cli.commands.completion import words as words_of
from newcomer_data import ALL
from warm_start import SYSTEM, drpo

LIMIT_S = 600
"""For the commands of one data set on 2 cores."""


def play(name: str, folder: Path) -> bool:
    """Play one data set; return whether the model learnt, else require that the run said so."""
    began = time.monotonic()
    data = ALL[name](folder).name
    done = drpo(folder, "init", data, "--system", SYSTEM[name], "--shots", "3", "--yes", limit_s=LIMIT_S)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "prompt 3, as the model reads it" in said and "to train on" in said
    trained = drpo(folder, "train", "recipe.py", "--plain", limit_s=LIMIT_S).returncode
    evaluated = drpo(folder, "eval", f"runs/{name}", "--json", limit_s=LIMIT_S).returncode
    assert evaluated == 0 and time.monotonic() - began < LIMIT_S
    summary = json.loads((folder / "runs" / name / "summary.json").read_text())
    before, after = summary["evaluation_before"], summary["evaluation_after"]
    learnt = after["low"] > before["high"]
    print(f"{name}: {before['reward_mean']:.3f} -> {after['reward_mean']:.3f}, {time.monotonic() - began:.0f} s")
    assert learnt or trained == 1 or summary["warning"] or after["reward_mean"] > before["reward_mean"]
    return bool(learnt)


@pytest.mark.slow
def test_a_new_user_gets_from_three_data_sets_to_results(tmp_path: Path):
    learnt = []
    for name in ALL:
        folder = tmp_path / name
        folder.mkdir()
        learnt.append(play(name, folder))
    assert sum(learnt) >= 2


def test_each_data_set_gets_from_a_warm_start_to_a_chat_in_five_commands():
    page = (Path(newcomer.__file__).parents[1] / "docs" / "sft.md").read_text()
    for name in ALL:
        typed = newcomer.commands(name, f"{name}.data")
        assert len(typed) <= newcomer.MOST_COMMANDS
        assert [words[0] for words in typed[-4:]] == ["train", "eval", "report", "chat"]
        assert typed[0][0] == ("sft" if name in newcomer.NEVER_RIGHT else "train")
        for words in typed:  # each is of a command and options that there are
            assert words[0] in COMMANDS
            options = {word.replace("--no-", "--") for word in words if word.startswith("--")}
            assert options <= {o.replace("--no-", "--") for o in words_of()[words[0]].options}, words
    assert f"drpo {' '.join(newcomer.commands('units', 'x')[0])}".removesuffix(" --plain") in page


def test_the_answers_of_a_chat_are_told_apart_by_their_models():
    said = "[runs/rl]\n5\n[start]\nIt is\n\n[a] 5\n[runs/rl]\n\n[start]\n6\n"
    assert newcomer.answers(said) == [("runs/rl", "5"), ("start", "It is\n\n[a] 5"), ("runs/rl", ""), ("start", "6")]


@pytest.mark.slow
def test_what_a_warm_start_and_rl_taught_is_answered_in_a_chat(tmp_path: Path):
    """Units, in five commands: some held-out answers of the chat are right; the model alone has none right."""
    result = newcomer.play("units", tmp_path)
    assert len(result["commands"]) == 5 and result["after"]["reward_mean"] > 0
    assert result["evaluated"]["reward_mean"] > 0
    assert sum(turn["reward"] == 1 for turn in result["chat"]) > 0


@pytest.mark.slow
def test_the_one_that_rl_alone_does_not_teach_learns_after_a_warm_start(tmp_path: Path):
    """Units without examples in the prompt: nothing is right before, and hardly anything after RL alone."""
    results = {}
    for arm in ("rl", "sft"):
        (tmp_path / arm).mkdir()
        results[arm] = warm_start.play("units", arm, tmp_path / arm)
    alone, warm = results["rl"], results["sft"]
    assert alone["before"]["reward_mean"] == 0 and alone["after"]["reward_mean"] < 0.05
    assert warm["after"]["reward_mean"] > warm["before"]["reward_mean"] > 0
    assert warm["after"]["low"] > alone["after"]["high"]
