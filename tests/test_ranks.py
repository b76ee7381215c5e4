"""Several processes are one run: the same losses and weights as one process, to float32 rounding."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from drpo import cli
from drpo.errors import InputError
from drpo.ranks import SINGLE_PROCESS, Ranks, select_device
from drpo.train.config import Run, configure
from drpo.train.loop import train
from drpo.train.records import METRICS, read_records
from drpo.train.step import balance_micro_batches
from drpo.train.stored import STATE
from support.processes import assert_nearly_same_run, launch
from support.rank import run_of
from support.runs import DETERMINISTIC
from support.tiny_world import REWARDS, STOPS, batched, grouped, how, sampled, tiny

Alone = Callable[[str], Path]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The run of a single process, of each kind that is asked for."""

    @cache
    def folder(kind: str) -> Path:
        made = tmp_path_factory.mktemp("alone") / kind
        train(run_of(kind), made)
        return made

    return folder


@pytest.mark.slow
def test_two_processes_are_one_run(alone: Alone, tmp_path: Path):
    launch(2, tmp_path / "run", "many", "none")
    assert_nearly_same_run(alone("many"), tmp_path / "run")


MORE = (
    (3, "turns", "none"),
    (2, "turns", "fsdp"),
    (4, "many", "none"),
    (4, "many", "fsdp"),
    (2, "many", "fsdp"),
    (4, "few", "none"),
    (4, "few", "fsdp"),
    (2, "few", "fsdp"),
    (2, "terms", "none"),
    (2, "resampled", "none"),
    (3, "resampled", "fsdp"),
    (2, "curriculum", "none"),
    (3, "terms", "fsdp"),
    (2, "critic", "none"),
    (3, "critic", "fsdp"),
    (2, "lora", "none"),
    (2, "lora", "fsdp"),
    (3, "lora", "fsdp"),
    (2, "experts", "fsdp"),
    (2, "replay", "none"),
    (2, "replay", "fsdp"),
    (2, "own replay", "none"),
    (2, "own replay", "fsdp"),
    (2, "compact", "none"),
    (3, "compact", "fsdp"),
)


@pytest.mark.parametrize(
    ("processes", "kind", "shard"),
    [
        (2, "tied", "fsdp"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE),
    ],
)
def test_more_processes_are_one_run(processes: int, kind: str, shard: str, alone: Alone, tmp_path: Path):
    launch(processes, tmp_path / "run", kind, shard)
    assert_nearly_same_run(alone(kind), tmp_path / "run")
    if "replay" in kind:
        metrics = [m for m in read_records(tmp_path / "run" / METRICS) if m["trained_tokens"]]
        assert metrics and all(m["routing_missing"] == 0 for m in metrics)
        assert kind == "own replay" or all(m["routing_replaced"] > 0 for m in metrics)
    attempts = [m.get("resampling_attempts", 0) for m in read_records(tmp_path / "run" / METRICS)]
    assert any(attempts) == (kind in ("resampled", "curriculum"))


def assert_divided(said: str, what: str) -> None:
    """Every weight is held once, and each of two processes holds about half."""
    held, whole = ([int(n) for n in re.findall(p, said)] for p in (rf"(\d+) of \d+ {what}", rf"of (\d+) {what}"))
    assert len(held) == 2 and sum(held) == whole[0] and max(held) < 0.6 * whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("then", [(), (4,)], ids=["one", "four then one"])
def test_stopped_on_two_processes_and_resumed_on(then: Sequence[int], alone: Alone, tmp_path: Path):
    folder = tmp_path / "run"
    assert_divided(launch(2, folder, "many", "fsdp", stop=4), "weights")
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert last.name == "step-000004" and len(list(last.glob("weights-*-of-00002.safetensors"))) == 2
    assert "weights-00001-of-00002.safetensors" in json.loads((last / STATE).read_text())["sha256"]
    for processes in then:
        launch(processes, folder, "many", "fsdp", stop=7)
        assert sorted((folder / "checkpoints").glob("step-*"))[-1].name == "step-000007"
    train(run_of("many", "fsdp"), folder)
    assert_nearly_same_run(alone("many"), folder)


@pytest.mark.slow
def test_moments_in_8_bits_are_read_by_any_number_of_processes(alone: Alone, tmp_path: Path):
    folder = tmp_path / "run"
    launch(2, folder, "compact", "fsdp", stop=4)
    launch(3, folder, "compact", "fsdp", stop=7)
    train(run_of("compact", "fsdp"), folder)
    assert_nearly_same_run(alone("compact"), folder)


@pytest.mark.slow
def test_a_critic_stopped_on_two_processes_and_resumed_on_three_then_on_one(alone: Alone, tmp_path: Path):
    folder = tmp_path / "run"
    assert_divided(launch(2, folder, "critic", "fsdp", stop=4), "values")
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    parts = {f"critic_{kind}-0000{i}-of-00002.safetensors" for kind in ("weights", "optimizer") for i in (1, 2)}
    assert {path.name for path in last.glob("critic_*")} == parts
    assert json.loads((last / STATE).read_text())["sha256"].keys() >= parts
    launch(3, folder, "critic", "fsdp", stop=7)
    train(run_of("critic", "fsdp"), folder)
    assert_nearly_same_run(alone("critic"), folder)


@pytest.mark.slow
def test_adapters_killed_on_two_processes_and_resumed_are_one_run_bit_for_bit(alone: Alone, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(2, whole, "lora", "fsdp")
    assert_divided(launch(2, killed, "lora", "fsdp", stop=5), "weights")
    last = killed / "checkpoints" / "step-000005"
    files = [load_file(path) for path in sorted(last.glob("weights-*-of-00002.safetensors"))]
    assert len(files) == 2 and all(files) and all(".lora_" in name for file in files for name in file)
    shutil.rmtree(last)  # as if killed before it was written
    launch(2, killed, "lora", "fsdp")
    for name in DETERMINISTIC:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    for path in sorted((whole / "checkpoints").glob("step-000010/*.safetensors")):
        assert_equal(load_file(path), load_file(killed / path.relative_to(whole)))
    assert_equal(*(load_file(folder / "model" / "model.safetensors") for folder in (whole, killed)))
    exported = [export_step(folder, 9, tmp_path / name) for name, folder in (("a", alone("lora")), ("b", killed))]
    torch.testing.assert_close(exported[0], exported[1], rtol=2e-4, atol=2e-5)


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def export_step(run: Path, step: int, target: Path) -> dict[str, Tensor]:
    """The weights that `drpo export` writes of a checkpoint."""
    assert cli.main(["export", str(run), str(target), "--step", str(step), "--trust-remote-code"]) == 0
    return load_file(target / "model.safetensors")


@given(n=st.integers(0, 40), size=st.integers(1, 9), engines=st.integers(1, 9))
def test_shares_are_all_of_it_in_order(n: int, size: int, engines: int):
    items = list(range(n))
    shares = [Ranks(r, size).shard(items) for r in range(size)]
    assert [i for share in shares for i in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    drawn = [Ranks(r, size, min(engines, size)).shard(items) for r in range(size)]
    assert [i for share in drawn for i in share] == items and not any(drawn[min(engines, size) :])


def test_micro_batches_are_shared_out_evenly_and_all_of_them():
    groups = grouped(sampled(*tiny(STOPS)), REWARDS)
    batch = batched(groups, how(ranks=3, micro_batch_tokens=10_000))[0]
    places = [len(m.input_ids) for m in batch.micro_batches]
    assert len(places) >= 3 and max(places) < 0.6 * sum(places)
    hands = [balance_micro_batches(batch.micro_batches, Ranks(r, 3)) for r in range(3)]
    assert sorted(id(m) for own, _ in hands for m in own) == sorted(map(id, batch.micro_batches))
    assert len({len(own) + len(idle) for own, idle in hands}) == 1
    assert all(not m.weight.any() for _, idle in hands for m in idle)
    assert balance_micro_batches(batch.micro_batches, SINGLE_PROCESS) == (list(batch.micro_batches), [])


def test_each_process_sees_its_own_device(monkeypatch: pytest.MonkeyPatch):
    for name in ("DRPO_DEVICE_CHOSEN", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    select_device()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ  # alone: nothing is hidden
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    select_device()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.delenv("DRPO_DEVICE_CHOSEN")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    select_device()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    monkeypatch.delenv("DRPO_DEVICE_CHOSEN")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(InputError, match="2 devices for LOCAL_RANK=2"):
        select_device()


def test_an_unknown_way_of_dividing_is_refused():
    with pytest.raises(InputError, match="shard='zero3'; known: none, fsdp"):
        configure(Run(), shard="zero3")
