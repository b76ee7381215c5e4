"""Every reference answer of the data sets marked against itself by math-verify; prints the table of docs/rewards.md.

    python tests/support/golds.py

A score depends on the answer alone, so each different answer of a set is marked once.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drpo.rewards import RewardConfig, RewardPool
from drpo.rewards.math import math_verify
from drpo.tasks.rows import reach, read_rows
from drpo.types import Problem

DATA = Path(os.environ.get("DRPO_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
SETS = {
    "AIME 2024": ("aime24/test.jsonl", "answer"),
    "AIME 2025": ("aime25/test.jsonl", "answer"),
    "AMC 2023": ("amc23/test.jsonl", "answer"),
    "MATH-500": ("math500/test.jsonl", "answer"),
    "GSM8K train": ("gsm8k/train.jsonl", "answer"),
    "GSM8K test": ("gsm8k/test.jsonl", "answer"),
    "DAPO-Math-17k": ("dapo_math_17k/train.parquet", "reward_model.ground_truth"),
}


@dataclass(frozen=True)
class Result:
    """Of one set: its rows, its different answers, and those that did not score 1, with what came instead."""

    rows: int
    answers: int
    exceptions: tuple[tuple[str, str], ...]


def answers(name: str) -> list[str]:
    """A set's answers, row by row."""
    file, field = SETS[name]
    rows = read_rows(str(DATA / file), "train")
    return [str(reach(row, field, name)).rpartition("####")[2].strip() for row in rows]


def marked(found: Sequence[str], pool: RewardPool) -> Result:
    """Mark each different answer, boxed, against itself."""
    different = sorted(set(found))
    marks = pool.score([(Problem.of_text(answer, "", answer), f"\\boxed{{{answer}}}") for answer in different])
    wrong = [(a, m.failure.text if m.failure else str(m.score)) for a, m in zip(different, marks, strict=True)]
    return Result(len(found), len(different), tuple((a, said) for a, said in wrong if said != "1.0"))


def line(name: str, result: Result) -> str:
    """A set's line in the table."""
    said = ", ".join(f"`{answer}`: {what}" for answer, what in result.exceptions) or "none"
    return f"| {name} | {result.rows:,} | {result.answers:,} | {said} |"


def main() -> None:
    """Print the table."""
    print("| data | rows | different answers | exceptions |\n|---|---|---|---|")
    with RewardPool(math_verify, RewardConfig(processes=2)) as pool:
        for name in SETS:
            print(line(name, marked(answers(name), pool)), flush=True)


if __name__ == "__main__":
    main()
