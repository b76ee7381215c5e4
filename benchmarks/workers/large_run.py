"""A run with as many rollouts as one likes: two real steps of a tiny model, then records as a long run has them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from drpo.recipes.addition import smoke
from drpo.train.config import Run, configure, to_json
from drpo.train.log import write_json
from drpo.train.loop import train
from drpo.train.records import (
    CHECKPOINTS,
    CONFIG,
    FILES,
    METRICS,
    ROLLOUTS,
    SUMMARY,
    TIMING,
    Sum,
    read_records,
)
from drpo.train.stored import STATE, SUMS, fingerprint, latest, read_state

PROMPTS, SAMPLES, TOKENS, UPDATES = 16, 8, 32, 4
BLOCKS = 16
"""Steps with different tokens and numbers; the next ones say the same again."""


def make(folder: Path, rollouts: int) -> Run:
    """Write the folder of a run that has sampled about so many rollouts and has one step left.

    Args:
        folder: new.
        rollouts: 128 a step, the last step is whole.

    Returns:
        Its configuration.
    """
    steps = -(-rollouts // (PROMPTS * SAMPLES))
    changes = {"sampling.samples": SAMPLES, "sampling.max_new_tokens": TOKENS, "eval_problems": 0}
    run = configure(smoke(), prompts=PROMPTS, updates=UPDATES, steps=2, **changes)
    train(run, folder)
    real = {name: read_records(folder / name)[-1] for name in (METRICS, TIMING)}
    records = [r for r in read_records(folder / ROLLOUTS) if r["step"] == 2]
    generator = np.random.default_rng(0)
    blocks = ["".join(_lines(records, generator)) for _ in range(BLOCKS)]
    with (folder / ROLLOUTS).open("w", encoding="utf-8") as out:
        for step in range(1, steps + 1):
            out.write(blocks[step % BLOCKS].replace('{"step": 2,', f'{{"step": {step},'))
    tokens = {"sampled_tokens": len(records) * TOKENS, "trained_tokens": len(records) * TOKENS}
    for name, record in {METRICS: real[METRICS] | tokens, TIMING: real[TIMING]}.items():
        (folder / name).write_text("".join(json.dumps(record | {"step": s}) + "\n" for s in range(1, steps + 1)))
    run = configure(run, steps=steps + 1)
    write_json(folder / CONFIG, to_json(run))
    (folder / SUMMARY).unlink()
    _move_checkpoint(folder, steps)
    return run


def _lines(records: list[dict[str, Any]], generator: np.random.Generator) -> Iterator[str]:
    """The records of a step with other tokens and numbers, all of them trained."""
    for i, record in enumerate(records):
        behavior_logp = -generator.exponential(1.0, TOKENS)
        logp = np.minimum(behavior_logp + generator.normal(0.0, 0.05, TOKENS), -1e-6)
        reward = float(generator.integers(2))
        yield (
            json.dumps(
                record
                | {
                    "reward": reward,
                    "advantage": reward - 0.5,
                    "update": i * UPDATES // len(records),
                    "finish_reason": "length",
                    "token_ids": generator.integers(3, 256, TOKENS).tolist(),
                    "behavior_logp": [float(f"{x:.8g}") for x in behavior_logp],
                    "logp": [float(f"{x:.8g}") for x in logp],
                },
                ensure_ascii=False,
            )
            + "\n"
        )


def _move_checkpoint(folder: Path, step: int) -> None:
    """Have the last checkpoint stand after a step, and the records be those that were written before it."""
    checkpoint = latest(folder / CHECKPOINTS)
    assert checkpoint is not None
    progress, _, sums = read_state(checkpoint)
    written = {name: Sum().read(folder / name).record() for name in FILES if (folder / name).exists()}
    moved = vars(replace(progress, step=step, records={**progress.records, **written}))
    (checkpoint / STATE).write_text(json.dumps(moved | {SUMS: sums | {STATE: fingerprint(moved)}}))
    checkpoint.rename(checkpoint.with_name(f"step-{step:06d}"))
