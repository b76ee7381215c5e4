"""Write DAPO-Math and AIME 2024 and 2025 as the parquet files that verl reads.

python cluster/verl/prepare_data.py                    from the hub
python cluster/verl/prepare_data.py --source FOLDER    from FOLDER/dapo_math_17k, FOLDER/aime24 and FOLDER/aime25
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from drpo.errors import InputError
from drpo.tasks import AIME24, AIME25, DapoMath
from drpo.types import Problem

HERE = Path(__file__).resolve().parent
SEED = 0  # of the order of rows; verl shuffles again


def row(problem: Problem, source: str, split: str, index: int) -> dict[str, Any]:
    """One line of a file, in the columns that verl's dataset and its reward manager ask for."""
    return {
        "data_source": source,
        "prompt": [dict(message) for message in problem.messages],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"split": split, "index": index},
    }


def training(folder: str | None) -> list[Problem]:
    """Every question of DAPO-Math once, without repeats and those whose answers disagree, and none held out."""
    records = replace(DapoMath(folder).records, holdout=0)
    return records.sample(records.counts.train, step=0, seed=SEED)


def write(path: Path, problems: Iterable[Problem], split: str) -> int:
    """Write one file, named after its set; returns the number of its rows."""
    rows = [row(problem, path.stem, split, i) for i, problem in enumerate(problems)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return len(rows)


def prepare(source: Path | None, out: Path) -> dict[str, int]:
    """Write the three files.

    Args:
        source: a folder with the sets' own folders; None loads them from the hub.
        out: the folder to write into.

    Returns:
        The number of rows of each file, by its name.

    Raises:
        InputError: a set that is not there, or not what it should be.
    """

    def folder(name: str) -> str | None:
        return None if source is None else str(source / name)

    sets = {
        "dapo_math": (training(folder("dapo_math_17k")), "train"),
        "aime24": (AIME24(folder("aime24")).held_out(30), "test"),
        "aime25": (AIME25(folder("aime25")).held_out(30), "test"),
    }
    return {name: write(out / f"{name}.parquet", *written) for name, written in sets.items()}


def main() -> None:
    """Read the command line; a message and status 2 where it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a folder with the sets (default: the hub)")
    parser.add_argument("--out", type=Path, default=HERE / "data", help="where to write (default: %(default)s)")
    asked = parser.parse_args()
    try:
        written = prepare(asked.source, asked.out)
    except InputError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for name, n_rows in written.items():
        print(f"{asked.out / name}.parquet: {n_rows} rows")


if __name__ == "__main__":
    main()
