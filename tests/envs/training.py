"""Ten steps of training in an environment."""

from pathlib import Path
from typing import Any

from drpo.tasks import Task
from drpo.train.loop import train
from drpo.train.records import METRICS, read_records
from support.environments import talkative
from support.worlds import digits, tiny_run


def ten_steps(task: Task, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Train a tiny model for ten steps, its turns rewarded by their digits besides; return the metrics of each step."""
    given = {"task": task, "steps": 10, "eval_problems": 2, "sampling.max_new_tokens": 12, "reward": digits, **changes}
    run = tiny_run(**given)
    train(run, folder, components=talkative(run))
    figures = read_records(folder / METRICS)
    steps = [f for f in figures if "grad_norm" in f]
    assert len(steps) == 10 and all(f["grad_norm"] > 0 for f in steps)
    assert all(f["environment_failed"] == 0 for f in steps), figures[-1]
    assert max(f["turns_max"] for f in steps) > 1
    return steps
