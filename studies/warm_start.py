"""Whether RL learns more after a warm start: the figures of docs/sft.md.

    python studies/warm_start.py [--sets dates units letters] [--shots 0] [--arms rl warm-up sft]

The three data sets of a new user (`newcomer_data.py`), through the commands that such a user types: `drpo init`, `drpo
train`; alone, with `--warm-up 'best_of(8)'`, and after `drpo sft` on given answers to 50 of the training problems.
Results go to results/warm_start.json, what is there is not done again; the table goes to the terminal and, by `python
studies/figures.py`, to the page. About five minutes a run on two cores.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from subprocess import run as run_process
from typing import Any

from command import run as run_command
from drpo.errors import InputError
from drpo.recipes import find
from drpo.tasks import Records
from drpo.train.records import SUMMARY, read_json
from markdown_tables import markdown
from newcomer_data import ALL

RESULTS = Path(__file__).resolve().parent / "results" / "warm_start.json"
SYSTEM: Mapping[str, str] = {
    "units": "Convert the unit. Reply with the number alone.",
    "letters": "Count the letter. Reply with the number alone.",
    "dates": "Reply with the date alone.",
}
GIVEN = 50
ARMS: Mapping[str, str] = {
    "rl": "RL alone",
    "warm-up": "`--warm-up 'best_of(8)'`",
    "sft": f"`drpo sft` on {GIVEN} given answers",
}


def drpo(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run a command as a user does; return its status and what it printed."""
    line = [sys.executable, "-m", "drpo", *arguments]
    done = run_process(line, cwd=folder, capture_output=True, text=True, check=False)
    print(" ".join(["drpo", *arguments]), done.stdout, done.stderr, sep="\n", flush=True)
    return done.returncode, done.stdout + done.stderr


def write_given(folder: Path) -> None:
    """Write conversations of some training problems and their answers, as `drpo sft` reads them."""
    task: Any = find(str(folder / "recipe.py")).data.task
    assert isinstance(task, Records)
    rows = [
        {"messages": [*map(dict, problem.messages), {"role": "assistant", "content": problem.answer}]}
        for problem in task.training_problems()[:GIVEN]
    ]
    (folder / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def play(name: str, shots: int, arm: str, folder: Path) -> dict[str, Any]:
    """Play one data set one way; return its figures."""
    data = ALL[name](folder).name
    status, _ = drpo(folder, "init", data, "--system", SYSTEM[name], "--shots", str(shots), "--yes")
    if status:
        raise InputError(f"{name}: drpo init ended with status {status}")
    began, warm = time.monotonic(), []
    if arm == "sft":
        with chdir(folder):  # where the recipe's data are
            write_given(folder)
        drpo(folder, "sft", "given.jsonl", "--model", "smollm2-135m", "--epochs", "2", "--out", "runs/warm", "--plain")
        warm = ["--model", "runs/warm"]
    if arm == "warm-up":
        warm = ["--warm-up", "best_of(8)"]
    status, _ = drpo(folder, "train", "recipe.py", *warm, "--out", "runs/rl", "--plain")
    seconds = round(time.monotonic() - began)
    if status not in (0, 1):
        return {"failed": True, "seconds": seconds}
    summary = read_json(folder / "runs" / "rl" / SUMMARY)
    warm_up = summary.get("warm_up", {})
    return {
        "cold": (warm_up.get("evaluation_before") or {}).get("reward_mean"),
        "before": summary["evaluation_before"]["reward_mean"],
        "after": summary["evaluation_after"]["reward_mean"],
        "low": summary["evaluation_after"]["low"],
        "high": summary["evaluation_after"]["high"],
        "problems": warm_up.get("problems"),
        "solved": warm_up.get("solved"),
        "learnt": warm_up.get("learnt"),
        "no_signal_steps": summary["no_signal_steps"],
        "steps": summary["steps"],
        "seconds": seconds,
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page's table."""
    head = ["data, examples in the prompt", "way", "before RL", "after RL", "steps without a signal", "minutes"]
    rows = []
    for name, result in sorted(results.items(), key=lambda item: _place(item[0])):
        data, shots, arm = name.split(",")
        known = f"{data}, {shots if shots != '0' else 'none'}", ARMS[arm]
        if "failed" in result:
            rows.append([*known, "no right answer", "", "", f"{result['seconds'] / 60:.1f}"])
            continue
        after = f"{result['after']:.1%} ({result['low']:.1%} to {result['high']:.1%})"
        silent = f"{result['no_signal_steps']} of {result['steps']}"
        rows.append([*known, f"{result['before']:.1%}", after, silent, f"{result['seconds'] / 60:.1f}"])
    return markdown(head, rows)


def _place(name: str) -> tuple[int, int, int]:
    data, shots, arm = name.split(",")
    return [*ALL].index(data), int(shots), [*ARMS].index(arm)


def main(arguments: Sequence[str]) -> int:
    """Play what is asked for and not done, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=[*ALL], default=[*ALL])
    parser.add_argument("--shots", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    options = parser.parse_args(arguments)
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in options.sets:
        for shots in options.shots:
            for arm in options.arms:
                key = f"{name},{shots},{arm}"
                if key in results:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    results[key] = play(name, shots, arm, Path(folder))
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
