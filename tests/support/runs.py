"""What tests of runs share: whether two are one, and a callback that ends one."""

import os
import shutil
import signal
from collections.abc import Mapping
from copy import deepcopy
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from drpo.objectives import Tokens
from drpo.train import stored
from drpo.train.callbacks import NullCallback
from drpo.train.fields import FIELDS
from drpo.train.records import CHECKPOINTS, EVALUATIONS, METRICS, ROLLOUTS

DETERMINISTIC = (METRICS, ROLLOUTS, EVALUATIONS)


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    last = stored.latest(folder / CHECKPOINTS)
    assert last is not None
    return {**load_file(last / stored.WEIGHTS), **load_file(last / stored.OPTIMIZER)}


def assert_same_run(a: Path, b: Path) -> None:
    for name in DETERMINISTIC:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    ours, theirs = final_tensors(a), final_tensors(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def put(record: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON with other values of the fields of some options."""
    found = deepcopy(dict(record))
    for name, value in values.items():
        *groups, last = FIELDS[name].split(".")
        reduce(getitem, groups, found)[last] = value
    return found


class StopsAfter(NullCallback):
    """Asks for the end after a step, and keeps what it is told."""

    def __init__(self, step: int) -> None:
        self.last, self.said = step, ""

    def stepped(self, step, metrics, seconds, groups) -> None:
        if step == self.last:
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, text: str) -> None:
        self.said += text


class CopiesAt(NullCallback):
    """Copies the run's folder when a step is recorded, which is what a kill at this moment would leave."""

    def __init__(self, step: int, source: Path, target: Path) -> None:
        self.step, self.source, self.target = step, source, target

    def stepped(self, step: int, *rest: Any) -> None:
        if step == self.step:
            shutil.copytree(self.source, self.target)


def tokens_of(records: list[dict]) -> Tokens:
    """The tokens of some records of a rollout."""
    column = {
        name: torch.tensor([x for r in records for x in r[name]])
        for name in ("logp", "behavior_logp", "divergence")
        if name in records[0]
    }
    n = [len(r["logp"]) for r in records]
    advantage = torch.tensor([r["advantage"] for r in records]).repeat_interleave(torch.tensor(n))
    sequence = torch.arange(len(n)).repeat_interleave(torch.tensor(n))
    return Tokens(advantage=advantage, keep=torch.ones_like(sequence).bool(), sequence=sequence, **column)
