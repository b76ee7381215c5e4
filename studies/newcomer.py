"""Three data sets of a new user, from a warm start through RL to a chat with the result: a table of docs/sft.md.

    python studies/newcomer.py [--sets units letters dates]

At most five commands each, which the results record as they were typed: `drpo sft` on given answers where the model is
never right by itself (units), else `--warm-up best_of(8)`; `drpo train --data`; `drpo eval`; `drpo report`; and
`drpo chat --versus start`, to which held-out questions are piped, each in a conversation of its own. What is in
results/newcomer.json is not done again, nor a training that has ended in --out.
"""

import argparse
import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from command import run as run_command
from drpo.errors import InputError, one_line
from drpo.model.names import SMOLLM2
from drpo.recipes.own_data import OwnData, read_own
from drpo.train.records import SUMMARY, read_json
from markdown_tables import markdown
from newcomer_data import ALL
from warm_start import RL, SFT, SYSTEM, WARM_UP, drpo, mean, write_given

RESULTS = Path(__file__).resolve().parent / "results" / "newcomer.json"
MOST_COMMANDS = 5
CHAT = ["chat", "runs/rl", "--versus", "start", "--temperature", "0", "--max-new-tokens", "16"]
ASKED = 20
"""Held-out questions of the chat."""
NEVER_RIGHT = frozenset({"units"})
"""Data sets on which best-of-8 finds nothing to learn from."""


def commands(name: str, data: str) -> list[list[str]]:
    """Return what the user types, without `drpo`; the last is the chat."""
    warm = name in NEVER_RIGHT
    sft = ["sft", "given.jsonl", "--model", SMOLLM2, *SFT, "--out", "runs/warm", "--plain"]
    start = ["--model", "runs/warm"] if warm else ["--warm-up", WARM_UP]
    train = ["train", "--data", data, "--system", SYSTEM[name], *RL, *start, "--out", "runs/rl", "--plain"]
    rest = [["eval", "runs/rl", "--json"], ["report", "runs/rl"], CHAT]
    return [*([sft] if warm else []), train, *rest]


def output(folder: Path, arguments: Sequence[str], typed: str = "") -> str:
    """Run a command as a user does; return its standard output.

    Raises:
        InputError: it failed.
    """
    done = drpo(folder, *arguments, typed=typed)
    if done.returncode:
        raise InputError(f"drpo {' '.join(arguments)} ended with status {done.returncode}")
    return done.stdout


def answers(said: str) -> list[tuple[str, str]]:
    """Return the answers of a chat as (model, text), in their order; each begins with a line of the model's name."""
    parts = re.split(r"^\[(runs/rl|start)\]\n", said, flags=re.MULTILINE)[1:]
    return [(model, text.rstrip("\n")) for model, text in zip(parts[::2], parts[1::2], strict=True)]


def play(name: str, folder: Path) -> dict[str, Any]:
    """Play one data set; return the commands, their figures, and the conversation."""
    data, began = ALL[name](folder).name, time.monotonic()
    with chdir(folder):
        task = read_own(OwnData(data, system=SYSTEM[name]))
        problems = task.held_out(ASKED)
    reward: Any = task.reward  # of a text, as are all that are guessed
    if name in NEVER_RIGHT:
        write_given(folder, name, data)
    *trained, evaluated, reported, chat = commands(name, data)
    for command in trained:
        if not (folder / command[command.index("--out") + 1] / SUMMARY).exists():
            output(folder, command)
    score = json.loads(output(folder, evaluated))
    output(folder, reported)
    said = answers(output(folder, chat, "".join(f"{p.prompt}\n/reset\n" for p in problems)))
    by_model = {model: [text for m, text in said if m == model] for model in ("start", "runs/rl")}
    summary = read_json(folder / "runs" / "rl" / SUMMARY)
    return {
        "commands": [shlex.join(["drpo", *command]) for command in [*trained, evaluated, reported, chat]],
        **{when: summary[f"evaluation_{when}"] for when in ("before", "after")},
        "evaluated": {key: score[key] for key in ("reward_mean", "low", "high", "n_problems", "n_samples")},
        "chat": [
            {
                "question": p.prompt,
                "answer": p.answer,
                "start": start,
                "reply": reply,
                "reward": reward(p, reply),
            }
            for p, start, reply in zip(problems, by_model["start"], by_model["runs/rl"], strict=True)
        ],
        "seconds": round(time.monotonic() - began),
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page's table."""
    rows = []
    for name in ALL:
        if name not in results:
            continue
        result = results[name]
        chat, first = result["chat"], result["chat"][0]
        rows.append(
            [
                name,
                "`drpo sft`" if name in NEVER_RIGHT else "best of 8",
                *(mean(result[when]) for when in ("before", "after")),
                f"{sum(turn['reward'] == 1 for turn in chat)} of {len(chat)}",
                f"{first['question']} **{one_line(first['reply'])}** (at the start: {one_line(first['start'])})",
                f"{len(result['commands'])}",
            ]
        )
    return markdown(
        ["data", "warm start", "held-out before RL", "after RL", "right in the chat", "its first answer", "commands"],
        rows,
    )


def main(arguments: Sequence[str]) -> int:
    """Play what is asked for and not done, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=[*ALL], default=[*ALL])
    parser.add_argument("--out", type=Path, default=Path("runs/newcomer"), help="folder of the runs, kept")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in options.sets:
        if name not in results:
            (options.out / name).mkdir(parents=True, exist_ok=True)
            results[name] = play(name, options.out / name)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
