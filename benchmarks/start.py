"""CPU time until a command answers, as a share of `import torch`: `python -m benchmarks.start`, in a minute."""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from drpo.recipes import find
from drpo.train import loop

FLOOR = (("-c", "pass"), ("-c", "import tyro, rich.logging"))
TORCH = ("-c", "import torch")
LIGHT = ("--help", "train --help", "recipes", "trian", "train dmo", "train demo --stepz 3", "eval ./nowhere")
OF_A_RUN = ("watch {} --once", "verify {}")
TORCH_ALONE = ("train demo --help", "eval --help")


def cpu_seconds(arguments: Sequence[str]) -> float:
    """Return user and system seconds of one Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(processes: Mapping[str, Sequence[str]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each process, taken in turns, after one round that is not counted."""
    turns = [{name: cpu_seconds(arguments) for name, arguments in processes.items()} for _ in range(rounds + 1)]
    return {name: median(turn[name] for turn in turns[1:]) for name in processes}


def main() -> None:
    """Print a line for each command."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rounds", type=int, default=5)
    with tempfile.TemporaryDirectory() as folder:
        loop.train(find("smoke"), Path(folder))
        commands = (*LIGHT, *(form.format(folder) for form in OF_A_RUN), *TORCH_ALONE)
        named = {f"drpo {c.replace(folder, 'RUN')}": ("-m", "drpo", *c.split()) for c in commands}
        plain = {" ".join(("python", *p)): p for p in (*FLOOR, TORCH)}
        seconds = measure(plain | named, asked.parse_args().rounds)
    torch = seconds[" ".join(("python", *TORCH))]
    for name, spent in seconds.items():
        print(f"{name:<40} {spent:5.2f} s  {spent / torch:5.2f}")


if __name__ == "__main__":
    main()
