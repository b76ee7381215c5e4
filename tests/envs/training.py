"""Ten steps of training in an environment."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from drpo.environments import EnvironmentTask, make
from drpo.train.loop import train
from drpo.train.records import METRICS, read_records
from support.environments import talkative
from support.worlds import digits, tiny_run


def ten_steps(task: EnvironmentTask, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Train a tiny model for ten steps, with the environments in a process of their own; return each step's metrics.

    Besides what its turns earn, the last turn is rewarded by its digits.
    """
    given = {"task": task, "steps": 10, "eval_problems": 2, "sampling.max_new_tokens": 12, "reward": digits, **changes}
    run = tiny_run(**given)
    components = talkative(run)
    with make(task, run.seed) as environments:
        driver = replace(components.driver, environments=environments)
        train(run, folder, components=replace(components, driver=driver, held_out_environments=environments))
    figures = read_records(folder / METRICS)
    steps = [f for f in figures if "grad_norm" in f]
    assert len(steps) == 10 and all(f["grad_norm"] > 0 for f in steps)
    assert all(f["environment_failed"] == 0 for f in steps), figures[-1]
    assert max(f["turns_max"] for f in steps) > 1
    return steps
