"""Every objective of 2026 trains the demo once: held-out accuracy before and after.

    python studies/objectives_2026.py --out runs/objectives_2026

Runs `drpo train demo --objective X --seed 0` for each of OBJECTIVES, one after the other, each in a folder of its own.
A run that is in results/objectives_2026.json is not done again; one that was stopped is resumed. Prints the table.

One seed shows that an objective trains. It does not compare them: the demo's learning rate and number of updates were
chosen for drpo(0.2).
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from command import run
from drpo.errors import InputError
from drpo.files import write_text
from drpo.objectives import REGISTRY
from drpo.spec import format_spec, parse_spec
from drpo.train.records import ENVIRONMENT, METRICS, SUMMARY, read_json, read_records
from markdown_tables import markdown

RESULTS = Path(__file__).resolve().parent / "results" / "objectives_2026.json"
SEED = 0
OBJECTIVES = (
    "drpo(0.2)",
    "none",
    "ipo(0.3)",
    "icepop(0.5, 5)",
    "kpop(0.1)",
    "cppo(0.2)",
    "vespo",
    "m2po(0.04)",
    "m2po_areal(0.04)",
    "gmpo(0.4, 0.4)",
    "topr",
    "drpo_eff(0.2)",
    "clip_cov",
    "kl_cov",
    "reinforce + 0.1*k2",
    "mask(0.1) + 0.002*k2",
    "drpo(0.2) + 0.04*ref_kl(0.2)",
    "ppo(0.2, 0.2)*opsm(1e-4)",
    "ppo(0.2, 0.2)*reject('seq_mean_k3', 0.01)",
    "reinforce*weight('sequence', 2)",
    "ppo(0.2, 0.2)*proximal*weight('token', 5)",
    "ppo(0.2, 0.2)*proximal*weight('token', 5)*binary_kl(0.1)",
    "ppo(0.2, 0.2)*proximal*second_moment(0.04)",
    "vespo(max_ratio=3)",
)
"""The first two are for reference. In this order."""
_SCORES = ("reward_mean", "low", "high")


def train(spec: str, folder: Path) -> None:
    """Run the demo in a process of its own.

    Raises:
        InputError: it failed.
    """
    command = [sys.executable, "-m", "drpo", "train", "demo", "--objective", spec, "--seed", str(SEED)]
    status = subprocess.run([*command, "--out", str(folder)]).returncode
    if status:
        raise InputError(f"--out {folder}: {spec!r} ended with exit status {status}; its last lines say why")


def record(folder: Path) -> dict[str, Any]:
    """Return what is kept of a finished run."""
    summary, machine, steps = (
        read_json(folder / SUMMARY),
        read_json(folder / ENVIRONMENT),
        read_records(folder / METRICS),
    )
    return {
        "objective": summary["objective"],
        "seed": summary["seed"],
        "steps": summary["steps"],
        "updates": summary["updates"],
        "problems": summary["evaluation_after"]["n_problems"],
        "before": [summary["evaluation_before"][name] for name in _SCORES],
        "after": [summary["evaluation_after"][name] for name in _SCORES],
        "training_seconds": summary["training_seconds"],
        "processor": machine["processor"],
        "cores": machine["cores"],
        "reward_mean": [step["reward_mean"] for step in steps],
    }


def read_results() -> list[dict[str, Any]]:
    """Return the committed runs."""
    return list(read_json(RESULTS)["runs"]) if RESULTS.exists() else []


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the page's table; an objective without a run is named as such."""
    done = {one["objective"]: one for one in runs}

    def row(spec: str) -> list[str]:
        one = done.get(format_spec(parse_spec(spec, REGISTRY), REGISTRY))
        if one is None:
            return [f"`{spec}`", "not run", "", ""]
        value, low, high = one["after"]
        return [
            f"`{spec}`",
            f"{one['before'][0]:.1%}",
            f"{value:.1%} ({low:.0%} to {high:.0%})",
            f"{max(one['reward_mean']):.2f}",
        ]

    head = ["objective", "held-out accuracy before", "after (95 %)", "best reward of a training step"]
    return markdown(head, list(map(row, OBJECTIVES)))


def study(arguments: Sequence[str]) -> int:
    """Run what is not in the results yet; write them after each run."""
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives_2026"), help="folder of the runs")
    parser.add_argument("--at-most", type=int, default=len(OBJECTIVES), help="runs to do now")
    options = parser.parse_args(list(arguments))
    runs = read_results()
    left = [
        s for s in OBJECTIVES if format_spec(parse_spec(s, REGISTRY), REGISTRY) not in {r["objective"] for r in runs}
    ]
    for spec in left[: options.at_most]:
        folder = options.out / "".join(c if c.isalnum() else "_" for c in spec)
        train(spec, folder)
        runs.append(record(folder))
        write_text(RESULTS, json.dumps({"runs": runs}, indent=1) + "\n")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(run(study))
