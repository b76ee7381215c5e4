"""Seconds and memory of `drpo autopsy` on 200,000 rollouts: `python -m benchmarks.autopsy`, in some minutes.

The dumps are made up, of 200 steps, each of 125 groups of 8, with 32 to 96 tokens to a rollout; text alone where the
format has nothing else. The time is that of the whole command, from its start, Python's imports included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

STEPS, GROUPS, SAMPLES = 200, 125, 8
LEAST, MOST = 32, 96
Batch = Mapping[str, Any]


def steps(scale: float) -> Iterator[Batch]:
    """Yield the columns of each step."""
    random = np.random.default_rng(0)
    for step in range(1, max(12, int(STEPS * scale)) + 1):
        n = GROUPS * SAMPLES
        lengths = random.integers(LEAST, MOST + 1, n)
        mu = -random.exponential(0.5, lengths.sum()).astype(np.float32)
        logp = np.minimum(0, mu + random.normal(0, 0.02, len(mu)).astype(np.float32))
        rewards = (random.random(n) < 0.2 + 0.6 * step / STEPS).astype(float)
        advantages = rewards - rewards.reshape(GROUPS, SAMPLES).mean(1).repeat(SAMPLES)
        ends = lengths.cumsum()[:-1]
        yield {
            "step": step,
            "ids": np.split(random.integers(0, 150_000, lengths.sum()), ends),
            "mu": np.split(mu, ends),
            "logp": np.split(logp, ends),
            "rewards": rewards,
            "advantages": advantages,
        }


def _listed(column: Any) -> list[float]:
    return [float(str(x)) for x in column]


def _write_lines(path: Path, batches: Iterator[Batch], record: Callable[[Batch, int], dict[str, Any]]) -> None:
    with path.open("w") as file:
        for batch in batches:
            file.writelines(json.dumps(record(batch, i)) + "\n" for i in range(len(batch["rewards"])))


def own_record(batch: Batch, i: int) -> dict[str, Any]:
    """Return a rollout in our own description, with both log-probabilities."""
    return {
        "step": batch["step"],
        "problem": f"{batch['step']}-{i // SAMPLES}",
        "reward": batch["rewards"][i],
        "advantage": batch["advantages"][i],
        "finish_reason": "stop",
        "token_ids": batch["ids"][i].tolist(),
        "behavior_logp": _listed(batch["mu"][i]),
        "logp": _listed(batch["logp"][i]),
    }


def open_instruct_record(batch: Batch, i: int) -> dict[str, Any]:
    """Return a rollout as open-instruct writes it, with the sampler's log-probabilities."""
    return {
        "step": batch["step"],
        "sample_idx": i,
        "prompt_idx": i // SAMPLES,
        "prompt_tokens": batch["ids"][i].tolist(),
        "response_tokens": batch["ids"][i].tolist(),
        "reward": batch["rewards"][i],
        "advantage": batch["advantages"][i],
        "finish_reason": "stop",
        "dataset": "made up",
        "logprobs": [float(x) for x in batch["mu"][i]],
    }


def verl_record(batch: Batch, i: int) -> dict[str, Any]:
    """Return a rollout as verl writes it: texts and a score."""
    question = f"question {i // SAMPLES} of step {batch['step']}: " + "what is it? " * 20
    text = "word " * len(batch["ids"][i])
    return {"input": question, "output": text, "gts": "7", "score": batch["rewards"][i], "step": batch["step"]}


def write_parquet(path: Path, batches: Iterator[Batch]) -> None:
    """Write our own description as parquet."""
    writer = None
    for batch in batches:
        n = len(batch["rewards"])
        table = pa.table(
            {
                "step": [batch["step"]] * n,
                "problem": [f"{batch['step']}-{i // SAMPLES}" for i in range(n)],
                "reward": batch["rewards"],
                "advantage": batch["advantages"],
                "finish_reason": ["stop"] * n,
                "token_ids": pa.array(batch["ids"]),
                "behavior_logp": pa.array(batch["mu"]),
                "logp": pa.array(batch["logp"]),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


DUMPS: Mapping[str, tuple[str, Callable[[Path, Iterator[Batch]], None]]] = {
    "own, both log-probabilities, JSON lines": ("a.jsonl", lambda p, b: _write_lines(p, b, own_record)),
    "own, both log-probabilities, parquet": ("a.parquet", write_parquet),
    "open-instruct, the sampler's": ("a.jsonl", lambda p, b: _write_lines(p, b, open_instruct_record)),
    "verl, texts": ("a.jsonl", lambda p, b: _write_lines(p, b, verl_record)),
}


def measure(path: Path, threads: int) -> tuple[float, float, float]:
    """Return the seconds of a command, those of a processor, and its peak memory in MiB."""
    command = [sys.executable, "-m", "drpo", "autopsy", str(path), "--json"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Print a line for each dump."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--only", default="", help="dumps whose name has this text")
    options = asked.parse_args()
    n = max(12, int(STEPS * options.scale)) * GROUPS * SAMPLES
    for name, (file, write) in DUMPS.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            write(path, steps(options.scale))
            seconds, cpu, memory = measure(path, options.threads)
            size = path.stat().st_size / 2**20
        told = f"{seconds:6.1f} s, {cpu:5.1f} s of a processor, {memory:5.0f} MiB of memory"
        print(f"{name:<42} {n:>8,} rollouts, {size:4.0f} MiB: {told}", flush=True)


if __name__ == "__main__":
    main()
