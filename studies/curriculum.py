"""Whether problems chosen by their pass rate give more groups with a signal: the figures of docs/methods.md.

    python studies/curriculum.py

A model of two layers, which knows nothing, on two finite sets of problems: `mixed`, a third of which every text solves
and a third none, and `even`, of which all can be learnt. Each problem names the kind of its first character. All runs
have the same problems, steps and completions; results go to results/curriculum.json, the table to the terminal and, by
`python studies/figures.py`, to the page. Three minutes on one core.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from command import run as run_command
from drpo.recipes.addition import smoke
from drpo.rewards import Reward, in_process
from drpo.seeds import derive
from drpo.train.config import Run, configure
from drpo.train.curriculum import Pools
from drpo.train.loop import train
from drpo.train.optim import AdamW
from drpo.train.records import EVALUATIONS, METRICS, read_records
from drpo.types import Problem
from markdown_tables import markdown

RESULTS = Path(__file__).resolve().parent / "results" / "curriculum.json"
SETS: Mapping[str, Sequence[str]] = {
    "mixed": ("any", "any", "digit", "capital", "word", "word"),
    "even": ("digit", "capital", "digit", "capital", "digit", "capital"),
}
"""Name of a set -> the kinds of its problems, in turns. Any: not a "q", 1 in 257; word: begins with "yes", never."""
ARMS: Mapping[str, Mapping[str, Any]] = {
    "neither": {},
    "`--curriculum pools`": {"curriculum": Pools()},
    "`--dynamic-sampling 1`": {"dynamic_sampling": 1},
    "both": {"curriculum": Pools(), "dynamic_sampling": 1},
}
STEPS, PROBLEMS, SEEDS = 60, 96, (0, 1, 2)
COLUMNS: Mapping[str, str] = {
    "signal": "groups with a signal",
    "sampled": "groups sampled for each",
    "middle": f"held-out reward after {STEPS // 2} steps",
    "end": f"after {STEPS}",
}


@in_process
def begins(problem: Problem, text: str) -> float:
    """Whether a text begins as the problem asks."""
    first = text[:1]
    match problem.answer:
        case "any":
            return float(first != "q")
        case "digit":
            return float(first.isascii() and first.isdigit())
        case "capital":
            return float(first.isascii() and first.isupper())
    return float(text.startswith("yes"))


@dataclass(frozen=True)
class Kinds:
    """A finite set of problems, each of a kind.

    Args:
        kinds: of the problems, in turns.
    """

    kinds: Sequence[str]

    @property
    def reward(self) -> Reward:
        """Score 1 if the text begins as asked."""
        return begins

    def training_problems(self) -> list[Problem]:
        """Return all problems to train on."""
        return [self._problem(f"train-{i}", i) for i in range(PROBLEMS)]

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Take the next n of the epochs, each in an order of its own."""
        places = [divmod(step * n + slot, PROBLEMS) for slot in range(n)]
        chosen = [_order(seed, epoch)[at] for epoch, at in places]
        return [self._problem(f"{step}-{slot}", i) for slot, i in enumerate(chosen)]

    def held_out(self, n: int) -> list[Problem]:
        """Return the next problems of the same kinds."""
        return [self._problem(f"held-out-{i}", PROBLEMS + i) for i in range(n)]

    def _problem(self, name: str, i: int) -> Problem:
        kind = self.kinds[i % len(self.kinds)]
        return Problem.of_text(name, f"{kind} {i}", kind)


@lru_cache
def _order(seed: int, epoch: int) -> list[int]:
    return sorted(range(PROBLEMS), key=lambda i: derive("kinds", seed, epoch, i))


def run_of(kinds: Sequence[str], seed: int, **changes: Any) -> Run:
    """Return a run on a set of problems."""
    run = configure(
        smoke(),
        task=Kinds(kinds),
        steps=STEPS,
        prompts=8,
        seed=seed,
        optimizer=AdamW(1e-3),
        precision="fp32",
        rollout_precision="fp32",
        eval_problems=48,
        eval_every=STEPS // 2,
        eval_samples=8,
        checkpoint_every=0,
        **{"sampling.samples": 8, "sampling.max_new_tokens": 4},
    )
    return configure(run, **changes)


def measured(folder: Path) -> dict[str, float]:
    """Return a run's figures, by the keys of `COLUMNS`."""
    steps = read_records(folder / METRICS)
    rewards = {e["step"]: e["reward_mean"] for e in read_records(folder / EVALUATIONS)}
    with_signal = 8 * sum(1 - m["frac_reward_zero_std"] for m in steps)
    sampled = sum(8 + m.get("resampling_attempts", 0) for m in steps)
    return {
        "signal": with_signal / (8 * STEPS),
        "sampled": sampled / with_signal,
        "middle": rewards[STEPS // 2],
        "end": rewards[STEPS],
    }


def table(results: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> str:
    """Return the page's table: means over the seeds, with the least and the greatest."""
    head = ["problems, option", *COLUMNS.values()]
    rows = []
    for name, arms in results.items():
        for arm, runs in arms.items():
            cells = [_spread([r[key] for r in runs], "{:.0%}" if key == "signal" else "{:.2f}") for key in COLUMNS]
            rows.append([f"{name}, {arm}", *cells])
    return markdown(head, rows)


def _spread(values: Sequence[float], form: str) -> str:
    mean, low, high = (form.format(v) for v in (fmean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def main(arguments: Sequence[str]) -> int:
    """Run all arms and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args(arguments)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, kinds in SETS.items():
        for arm, changes in ARMS.items():
            for seed in options.seeds:
                with tempfile.TemporaryDirectory() as folder:
                    train(run_of(kinds, seed, **changes), folder, keep_model=False)
                    results.setdefault(name, {}).setdefault(arm, []).append(measured(Path(folder)))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
