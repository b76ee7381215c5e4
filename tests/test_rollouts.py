"""Staleness: which weights sample which rollout, in turn or in the background, and after a crash."""

import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drpo.objectives import DPPO
from drpo.rollout import ScriptedEngine
from drpo.train import stored
from drpo.train.callbacks import NullCallback
from drpo.train.config import Run
from drpo.train.loop import train
from drpo.train.optim import AdamW
from drpo.train.records import CHECKPOINTS, METRICS, ROLLOUTS, read_records
from drpo.train.rollouts import IN_FLIGHT, OLD_WEIGHTS
from drpo.train.setup import Components, build
from drpo.types import Generation, Request
from support.forks import KillItself, fork
from support.rollouts import with_engine
from support.runs import assert_same_run
from support.worlds import tiny_run


def version_of(step: int, async_steps: int, sync_every: int) -> int:
    """By the definition: sampled when step - async_steps begins, with the weights of the last sync."""
    begun = max(step - async_steps, 0)
    return begun - begun % sync_every


def scripted(run: Run, **changes: object) -> Components:
    components = build(run)

    def script(request: Request) -> str:
        sample = int(request.key[-1])
        return f"{components.tokenizer.decode(request.prompt_ids)}{sample}" * (sample + 1)

    return replace(with_engine(components, ScriptedEngine(components.tokenizer, script)), **changes)


@pytest.mark.parametrize(
    ("async_steps", "sync_every", "overlap"),
    [
        (2, 1, False),
        (1, 2, False),
        (0, 3, False),
        (2, 3, True),
        *(
            pytest.param(*s, marks=pytest.mark.slow)
            for s in [(0, 1, False), (1, 1, False), (2, 3, False), (1, 1, True)]
        ),
    ],
)
def test_every_rollout_is_sampled_with_the_weights_it_should_be(
    tmp_path: Path, async_steps: int, sync_every: int, overlap: bool
) -> None:
    run = tiny_run(steps=7, async_steps=async_steps, sync_every=sync_every, overlap=overlap, eval_problems=0)
    components = scripted(run)
    train(run, tmp_path, components=components)
    seen = {r["step"] - 1: r["version"] for r in read_records(tmp_path / ROLLOUTS)}
    wanted = {step: version_of(step, async_steps, sync_every) for step in range(7)}
    assert seen == wanted
    metrics = read_records(tmp_path / METRICS)
    assert [m["staleness"] for m in metrics] == [s - v for s, v in wanted.items()]
    assert [m["staleness_max"] for m in metrics] == [m["staleness"] for m in metrics]
    assert max(m["staleness_max"] for m in metrics) <= async_steps + sync_every - 1
    assert components.driver.engine.loaded == sorted({0, *range(0, 7, sync_every)})


class Spy:
    """Notes how the weights that the engine samples with differ from those of its version."""

    def __init__(self, components: Components) -> None:
        self.engine, self.policy = components.driver.engine, components.policy
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.used: list[tuple[int, bool]] = []

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        truth = self.weights[self.engine.version]
        own = dict(self.engine.model.named_parameters())
        self.used.append((self.engine.version, all(torch.equal(truth[n], own[n]) for n in truth)))
        return self.engine.generate(requests)

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        kept = {name: value.clone() for name, value in state.items()}
        before = self.weights.setdefault(version, kept)
        assert all(torch.equal(before[n], kept[n]) for n in kept), f"other weights under version {version}"
        self.engine.load_weights(state, version)

    def close(self) -> None:
        self.engine.close()


@pytest.mark.parametrize(
    ("async_steps", "sync_every"),
    [pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(0, 3, marks=pytest.mark.slow), (2, 3)],
)
def test_an_evaluation_sees_the_newest_weights_and_leaves_the_old_ones(
    tmp_path: Path, async_steps: int, sync_every: int
) -> None:
    schedule = {"async_steps": async_steps, "sync_every": sync_every, "eval_every": 1, "eval_problems": 2}
    run = tiny_run(steps=5, optimizer=AdamW(1e-2), **schedule)
    spied = Spy(components := build(run))
    train(run, tmp_path, components=with_engine(components, spied))
    assert all(right for _, right in spied.used)
    seen = {r["step"] - 1: r["version"] for r in read_records(tmp_path / ROLLOUTS)}
    assert seen == {step: version_of(step, async_steps, sync_every) for step in range(5)}
    evaluated = [spied.weights[v] for v in range(6)]  # one of each version, all different
    assert all(any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(evaluated))


class Slow:
    """Takes its time, now and then."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        time.sleep(0.02 * (int(requests[0].key[-3]) % 3))
        return self.engine.generate(requests)

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        self.engine.load_weights(state, version)

    def close(self) -> None:
        self.engine.close()


@pytest.mark.parametrize(
    ("async_steps", "sync_every", "engine"),
    [(1, 1, "scripted"), pytest.param(2, 2, "scripted", marks=pytest.mark.slow), (2, 2, "transformers")],
)
def test_in_the_background_is_the_same_run_bit_for_bit(
    tmp_path: Path, async_steps: int, sync_every: int, engine: str
) -> None:
    for overlap in (False, True):
        run = tiny_run(steps=5, async_steps=async_steps, sync_every=sync_every, overlap=overlap, eval_every=2)
        components = build(run)
        if engine == "scripted":
            components = scripted(run)
            components = with_engine(components, Slow(components.driver.engine))
        train(run, tmp_path / str(overlap), components=components)
    assert_same_run(tmp_path / "True", tmp_path / "False")


class Meeting(NullCallback):
    """Opens a door when an update begins."""

    def __init__(self) -> None:
        self.door = threading.Event()

    def phase(self, name: str) -> None:
        if name == "update":
            self.door.set()


def test_the_next_rollout_is_sampled_while_this_one_is_trained_on(tmp_path: Path) -> None:
    """The engine's second call waits for an update to begin, which in turn it could not."""
    watch, met = Meeting(), []
    run = tiny_run(steps=3, async_steps=1, overlap=True, eval_problems=0)
    components = scripted(run)

    def script(request: Request) -> str:
        if str(request.key[-2]).startswith("1-"):
            met.append(watch.door.wait(20))
        return "1"

    components.driver.engine.script = script
    train(run, tmp_path, watch, components)
    assert met and all(met)


@pytest.mark.parametrize(
    ("async_steps", "sync_every", "overlap"),
    [pytest.param(1, 1, True, marks=pytest.mark.slow), pytest.param(0, 3, False, marks=pytest.mark.slow), (2, 3, True)],
)
def test_killed_and_resumed_is_one_run_bit_for_bit(
    one_thread: None, tmp_path: Path, async_steps: int, sync_every: int, overlap: bool
) -> None:
    """A checkpoint in mid-refresh, with rollouts in flight: they and the old weights come back."""
    objective = DPPO(0.05, divergence="topk_tv")  # reads more of a completion than others do
    run = tiny_run(
        objective=objective,
        steps=6,
        async_steps=async_steps,
        sync_every=sync_every,
        overlap=overlap,
        checkpoint_every=4,
        eval_every=4,
    )
    train(run, tmp_path / "whole")
    folder = tmp_path / "killed"
    killed = fork(tmp_path / "out", train, run, folder, KillItself(5, "update"))
    assert killed.end()[0] == -signal.SIGKILL
    last = stored.latest(folder / CHECKPOINTS)
    assert last is not None and last.name == "step-000004"
    assert (last / IN_FLIGHT).exists() == (async_steps > 0)
    assert (last / OLD_WEIGHTS).exists() == (sync_every > 1)
    assert train(run, folder)["finished"]
    assert_same_run(tmp_path / "whole", folder)


class Dying:
    """Dies while it samples the rollout of a step, or while it is given weights."""

    def __init__(self, engine: ScriptedEngine, step: int, where: str) -> None:
        self.engine, self.step, self.where = engine, step, where

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        if self.where == "generate" and requests[0].key[:-2] == (0, self.step):
            raise ConnectionError("the sampler is gone")
        return self.engine.generate(requests)

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        if self.where == "load" and version == self.step:
            raise ConnectionError("the sampler is gone")
        self.engine.load_weights(state, version)

    def close(self) -> None:
        self.engine.close()


@pytest.mark.parametrize(
    ("where", "async_steps", "overlap"),
    [
        ("load", 0, False),
        ("generate", 1, False),
        ("generate", 1, True),
        pytest.param("generate", 0, False, marks=pytest.mark.slow),
        pytest.param("load", 1, False, marks=pytest.mark.slow),
        pytest.param("load", 1, True, marks=pytest.mark.slow),
    ],
)
def test_a_sampler_that_dies_costs_no_finished_step(
    tmp_path: Path, where: str, async_steps: int, overlap: bool
) -> None:
    run = tiny_run(steps=6, async_steps=async_steps, overlap=overlap)
    components = scripted(run)
    with pytest.raises(ConnectionError, match="the sampler is gone"):
        train(run, tmp_path / "died", components=with_engine(components, Dying(components.driver.engine, 3, where)))
    last = stored.latest(tmp_path / "died" / CHECKPOINTS)
    finished = len(read_records(tmp_path / "died" / METRICS))
    assert last is not None and last.name == f"step-{finished:06d}"
    assert finished == (
        3 if where == "load" or overlap or async_steps == 0 else 2
    )  # in turn, rollout 3 is sampled at step 2
    train(run, tmp_path / "died", components=scripted(run))
    assert len(read_records(tmp_path / "died" / METRICS)) == 6
    if async_steps == 0:  # otherwise what could not be sampled is sampled with newer weights
        train(run, tmp_path / "whole", components=scripted(run))
        assert_same_run(tmp_path / "whole", tmp_path / "died")
