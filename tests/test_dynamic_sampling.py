"""Dynamic sampling: which groups are sampled again, how often, with which random numbers and weights; after a kill too.

Not covered: several processes (test_ranks.py).
"""

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from drpo.credit.advantages import reward
from drpo.credit.gae import GAE
from drpo.errors import InputError
from drpo.reductions import token_mean
from drpo.rewards import in_process
from drpo.rollout import ScriptedEngine
from drpo.train import stored
from drpo.train.config import Run, configure
from drpo.train.loop import train
from drpo.train.records import CHECKPOINTS, METRICS, ROLLOUTS, read_records
from drpo.train.rollouts import IN_FLIGHT
from drpo.train.setup import build
from drpo.types import Problem, Request
from support.forks import KillItself, fork
from support.rollouts import with_engine
from support.runs import assert_same_run
from support.worlds import tiny_run


def attempt_of(request: Request) -> int:
    """Of a key (seed, step, [attempt,] problem, sample)."""
    return int(request.key[2]) if len(request.key) == 5 else 0


def place_of(request: Request) -> int:
    return int(str(request.key[-2]).rpartition("-")[2])


def sampled_again(folder: Path, run: Run) -> list[Request]:
    """Train on a script in which problem i of a step has different rewards from attempt i on; return the requests."""
    components, asked = build(run), []

    def script(request: Request) -> str:
        asked.append(request)
        right = int(request.key[-1]) % 2 and attempt_of(request) >= place_of(request)
        return "1" if right else "x"

    train(
        run, folder, components=with_engine(components, ScriptedEngine(components.tokenizer, script)), keep_model=False
    )
    return asked


def test_groups_of_equal_rewards_are_sampled_again_up_to_the_bound_and_dropped_beyond(tmp_path: Path) -> None:
    run = tiny_run(steps=2, eval_problems=0, dynamic_sampling=2, reduction=token_mean, updates=1)
    asked = sampled_again(tmp_path, run)
    first = [(attempt_of(r), place_of(r)) for r in asked if r.key[1] == 0]
    wanted = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3)]  # at the bound problem 3 stays
    assert first == [pair for pair in wanted for _ in range(4)]
    assert len({r.key for r in asked}) == len(asked)
    for metrics in read_records(tmp_path / METRICS):
        assert (metrics["resampled_groups"], metrics["resampling_attempts"]) == (3, 1 + 2 + 2)
        assert metrics["frac_reward_zero_std"] == 0.25
    for record in read_records(tmp_path / ROLLOUTS):
        place = int(record["problem"].rpartition("-")[2])
        assert record.get("attempt", 0) == min(place, 2)
        assert ("advantage" in record) == (place < 3)  # no token of the last counts anywhere, in no normaliser either


def test_without_it_each_group_is_sampled_once_and_all_of_them_count(tmp_path: Path) -> None:
    asked = sampled_again(tmp_path, tiny_run(steps=1, eval_problems=0))
    assert [len(r.key) for r in asked] == [4] * 16
    (metrics,), records = read_records(tmp_path / METRICS), read_records(tmp_path / ROLLOUTS)
    assert "resampled_groups" not in metrics and metrics["frac_reward_zero_std"] == 0.75
    assert all("advantage" in record and "attempt" not in record for record in records)


CALLS: list[str] = []


@in_process
def counting(problem: Problem, text: str) -> float:
    CALLS.append(text)
    return float("1" in text)


def test_no_completion_is_scored_twice(tmp_path: Path) -> None:
    CALLS.clear()
    asked = sampled_again(tmp_path, tiny_run(steps=2, eval_problems=0, dynamic_sampling=1, reward=counting))
    assert len(CALLS) == len(asked) == 2 * (16 + 12)


def again(**changes: object) -> Run:
    return tiny_run(steps=6, dynamic_sampling=2, eval_every=3, checkpoint_every=3, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("async_steps", "sync_every"), [(1, 1), (2, 2)])
def test_all_attempts_of_a_step_have_its_weights_in_the_background_too(
    one_thread: None, tmp_path: Path, async_steps: int, sync_every: int
) -> None:
    run = again(async_steps=async_steps, sync_every=sync_every)
    for overlap in (False, True):
        train(configure(run, overlap=overlap), tmp_path / str(overlap))
    assert_same_run(tmp_path / "True", tmp_path / "False")
    records = read_records(tmp_path / "True" / ROLLOUTS)
    assert {r.get("attempt", 0) for r in records} == {0, 1, 2}
    versions = {step: {r["version"] for r in records if r["step"] == step} for step in range(1, 7)}
    assert all(len(of_step) == 1 for of_step in versions.values())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"async_steps": 2, "overlap": True}], ids=["now", "ahead"])
def test_killed_and_resumed_is_one_run_bit_for_bit(one_thread: None, tmp_path: Path, changes: dict) -> None:
    """Rollouts in flight come back with their attempts, and are scored beside those that are then sampled."""
    run, folder = again(**changes), tmp_path / "killed"
    train(run, tmp_path / "whole")
    killed = fork(tmp_path / "out", train, run, folder, KillItself(4, "update"))
    assert killed.end()[0] == -signal.SIGKILL
    last = stored.latest(folder / CHECKPOINTS)
    assert last is not None and (last / IN_FLIGHT).exists() == bool(changes)
    assert train(run, folder)["finished"]
    assert_same_run(tmp_path / "whole", folder)


def test_what_cannot_be_is_refused_in_a_line() -> None:
    refused: Sequence[tuple[dict, str]] = (
        ({"dynamic_sampling": -1}, r"dynamic_sampling=-1: must be 0 or more"),
        ({"dynamic_sampling": 5000}, r"dynamic_sampling=5000: at most 1,024"),
        ({"dynamic_sampling": 2, "critic": GAE()}, r"dynamic_sampling=2: a critic learns from equal rewards too"),
        (
            {"dynamic_sampling": 2, "advantage": reward},
            r"dynamic_sampling=2: --advantage reward learns from equal rewards too; leave one of the two out",
        ),
    )
    for changes, message in refused:
        with pytest.raises(InputError, match=message):
            tiny_run(**changes)
