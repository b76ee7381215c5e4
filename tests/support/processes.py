"""Runs of several processes, and whether one is that of a single process."""

import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drpo.train.records import EVALUATIONS, METRICS, ROLLOUTS, read_records
from support.forks import fork
from support.rank import main as rank_main


def launch(processes: int, folder: Path, kind: str, shard: str, stop: int = 0) -> str:
    """Train in several processes, which find each other as torchrun's would; return what they printed."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    forks = [
        fork(
            folder.parent / f"{folder.name}-{stop}-rank-{rank}",
            rank_main,
            *(str(folder), kind, shard, str(stop)),
            environment=place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)},
        )
        for rank in range(processes)
    ]
    ends = [process.end() for process in forks]
    assert all(status == 0 for status, _ in ends), "\n".join(out[-2000:] for _, out in ends)
    return "".join(out for _, out in ends)


EXTREMES = {"weight_min": 5e-3, "weight_max": 5e-3}
"""How far these may differ: rounding decides the sign of an advantage next to 0, and so between 1 - x and 1 + x."""


def assert_nearly_same_run(one: Path, several: Path) -> None:
    ours, theirs = read_records(one / METRICS), read_records(several / METRICS)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for mine, other in zip(a.get("updates", []), b.get("updates", []), strict=True):
            assert mine.keys() == other.keys()
            for name, value in mine.items():
                assert other[name] == pytest.approx(value, rel=2e-4, abs=2e-5), (a["step"], name)
        assert a.keys() == b.keys()
        for name in a.keys() - {"updates"}:
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=EXTREMES.get(name, 2e-5)), (a["step"], name)
    drawn = [[(r["problem"], r["sample"], r["token_ids"]) for r in read_records(f / ROLLOUTS)] for f in (one, several)]
    assert drawn[0] == drawn[1]
    assert [e["reward_mean"] for e in read_records(one / EVALUATIONS)] == pytest.approx(
        [e["reward_mean"] for e in read_records(several / EVALUATIONS)]
    )
    mine, other = (load_file(f / "model" / "model.safetensors") for f in (one, several))
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        torch.testing.assert_close(other[name], value, rtol=2e-4, atol=2e-5)
