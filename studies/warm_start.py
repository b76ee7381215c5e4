"""Whether RL learns after a warm start what it does not learn alone: the table of docs/sft.md.

    python studies/warm_start.py [--sets dates units letters] [--arms rl warm-up sft]

The three data sets of a new user (`newcomer_data.py`), without examples in the prompt, by the commands that such a user
types: `drpo train --data`; with `--warm-up`; and after `drpo sft` on given answers to some of the training problems.
Results go to results/warm_start.json, and what is there is not done again; the table goes to the terminal and, by
`python studies/figures.py`, to the page. A few minutes a run on two cores.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from itertools import product
from pathlib import Path
from subprocess import CompletedProcess
from subprocess import run as run_process
from typing import Any

from command import run as run_command
from drpo.model.names import SMOLLM2
from drpo.recipes.own_data import OwnData, read_own
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
SFT = ("--epochs", "3", "--batch", "8", "--holdout", "0")
WARM_UP = "best_of(8, problems=64)"
RL = (
    *(
        "--sampling.max-new-tokens",
        "16",
        "--learning-rate",
        "2e-5",
        "--prompts",
        "8",
        "--steps",
        "10",
        "--updates",
        "2",
    ),
    *("--eval-problems", "50", "--eval-samples", "2", "--no-doctor"),
)
ARMS: Mapping[str, str] = {
    "rl": "RL alone",
    "warm-up": f"`--warm-up '{WARM_UP}'`",
    "sft": f"`drpo sft` on {GIVEN} given answers",
}


def drpo(folder: Path, *arguments: str, typed: str = "", limit_s: float | None = None) -> "CompletedProcess[str]":
    """Run a command as a user does, and print what it printed.

    Args:
        folder: the working folder.
        arguments: of `drpo`.
        typed: its standard input.
        limit_s: seconds that it may take; None for any.

    Raises:
        TimeoutExpired: it took longer.
    """
    line = [sys.executable, "-m", "drpo", *arguments]
    done = run_process(line, cwd=folder, input=typed, capture_output=True, text=True, timeout=limit_s, check=False)
    print(" ".join(["drpo", *arguments]), done.stdout, done.stderr, sep="\n", flush=True)
    return done


def write_given(folder: Path, name: str, data: str) -> None:
    """Write conversations of some training problems and their answers, as `drpo sft` reads them."""
    with chdir(folder):
        problems = read_own(OwnData(data, system=SYSTEM[name])).training_problems()[:GIVEN]
    rows = [{"messages": [*map(dict, p.messages), {"role": "assistant", "content": p.answer}]} for p in problems]
    (folder / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def play(name: str, arm: str, folder: Path) -> dict[str, Any]:
    """Play one data set one way; return its figures."""
    data, began, warm = ALL[name](folder).name, time.monotonic(), []
    if arm == "sft":
        write_given(folder, name, data)
        drpo(folder, "sft", "given.jsonl", "--model", SMOLLM2, *SFT, "--out", "runs/warm", "--plain")
        warm = ["--model", "runs/warm"]
    if arm == "warm-up":
        warm = ["--warm-up", WARM_UP]
    status = drpo(
        folder, "train", "--data", data, "--system", SYSTEM[name], *RL, *warm, "--out", "runs/rl", "--plain"
    ).returncode
    seconds = round(time.monotonic() - began)
    if status not in (0, 1):
        return {"failed": True, "seconds": seconds}
    summary = read_json(folder / "runs" / "rl" / SUMMARY)
    warm_up = summary.get("warm_up", {})
    return {
        **{when: summary[f"evaluation_{when}"] for when in ("before", "after")},
        **{name: warm_up.get(name) for name in ("problems", "solved", "learnt", "evaluation_before")},
        **{name: summary[name] for name in ("no_signal_steps", "steps")},
        "seconds": seconds,
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page's table."""
    rows = []
    for name in sorted(results, key=_place):
        result, (data, arm) = results[name], name.split(",")
        if "failed" in result:
            rows.append([data, ARMS[arm], "nothing to learn from", "", ""])
            continue
        before, after = (mean(result[when]) for when in ("before", "after"))
        rows.append(
            [data, ARMS[arm], before, after, f"{result['steps'] - result['no_signal_steps']} of {result['steps']}"]
        )
    return markdown(["data", "way", "held-out before RL", "after RL", "steps with a signal"], rows)


def mean(evaluation: Mapping[str, Any]) -> str:
    """Return an evaluation's accuracy with its interval, for a table."""
    return f"{evaluation['reward_mean']:.1%} ({evaluation['low']:.1%} to {evaluation['high']:.1%})"


def _place(name: str) -> tuple[int, int]:
    data, arm = name.split(",")
    return [*ALL].index(data), [*ARMS].index(arm)


def main(arguments: Sequence[str]) -> int:
    """Play what is asked for and not done, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=[*ALL], default=[*ALL])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    options = parser.parse_args(arguments)
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name, arm in product(options.sets, options.arms):
        if f"{name},{arm}" not in results:
            with tempfile.TemporaryDirectory() as folder:
                results[f"{name},{arm}"] = play(name, arm, Path(folder))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
