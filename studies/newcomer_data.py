"""Three small data sets, as a new user of one's own would have them, from a fixed seed: units, letters, dates."""

import csv
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet

UNITS = {
    ("metres", "centimetres"): 100,
    ("kilometres", "metres"): 1000,
    ("kilograms", "grams"): 1000,
    ("hours", "minutes"): 60,
    ("minutes", "seconds"): 60,
    ("weeks", "days"): 7,
}
WORDS = """
banana balloon coffee pepper kettle ribbon saddle rabbit summer letter bottle carrot cheese butter garden window mirror
potato tomato orange purple yellow silver copper marble pebble puddle needle bubble paddle tunnel tennis kitten puppet
ladder hammer dinner winner runner rudder cotton button lesson tissue assess access success express
"""
MONTHS = "January February March April May June July August September October November December"


def units(folder: Path, rows: int = 600) -> Path:
    """`units.jsonl`: how many of a smaller unit a number of a larger one is; columns question, answer."""
    rng = random.Random("units")
    table = []
    for _ in range(rows):
        (large, small), factor = rng.choice(list(UNITS.items()))
        n = rng.randint(2, 99)
        table.append({"question": f"How many {small} are {n} {large}?", "answer": n * factor})
    path = folder / "units.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def letters(folder: Path, rows: int = 600) -> Path:
    """`letters.csv`: how often a letter is in a word; columns prompt, label."""
    rng = random.Random("letters")
    path = folder / "letters.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "label"])
        for _ in range(rows):
            word = rng.choice(WORDS.split())
            letter = rng.choice(word)
            table.writerow([f'How many times is the letter "{letter}" in the word "{word}"?', word.count(letter)])
    return path


def dates(folder: Path, rows: int = 600) -> Path:
    """`dates.parquet`: dates in another form; columns instruction, output, and one of no use."""
    rng = random.Random("dates")
    table = []
    for i in range(rows):
        year, month, day = rng.randint(1950, 2030), rng.randint(1, 12), rng.randint(1, 28)
        table.append(
            {
                "id": i,
                "instruction": f"Write the date {MONTHS.split()[month - 1]} {day}, {year} as year-month-day.",
                "output": f"{year}-{month:02}-{day:02}",
            }
        )
    path = folder / "dates.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return path


ALL: Mapping[str, Callable[..., Path]] = {"units": units, "letters": letters, "dates": dates}
