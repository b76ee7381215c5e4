"""Rewards that are `async def`: many calls are awaited at once in a process, with the same failures as any other."""

import asyncio

import pytest

from drpo.rewards import RewardConfig, RewardPool, in_process
from drpo.rewards.contract import is_async
from drpo.types import Problem, RewardResult
from support import async_rewards

QUESTION = Problem.of_text("7", "question", "0")


def asking(texts):
    return [(QUESTION, text) for text in texts]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def pool(request):
    with RewardPool(async_rewards.obey, RewardConfig(processes=request.param, seconds=0.5)) as pool:
        yield pool


def kinds(scores):
    return [m.failure.kind if m.failure else m.score for m in scores]


def test_as_many_calls_are_awaited_at_once_as_the_reward_allows(pool):
    scores = [m.score for m in pool.score(asking(["count"] * 12))]
    assert max(scores) == async_rewards.obey.concurrency and len(scores) == 12


def test_a_call_that_fails_or_is_late_costs_its_own_score_only_and_order_is_kept(pool):
    texts = ["none", "wait", "parts", "raise", "nan", "string", "late", "count"]
    none, waited, parts, *others, last = pool.score(asking(texts))
    assert none.score is None and none.failure is None
    assert (waited.failure.kind, waited.failure.text) == ("timed_out", "timed out after 0.5 s")
    assert parts.result == RewardResult(0.5, {"style": 2.0})
    assert kinds(others) == ["raised", "not_finite", "not_a_number", "raised"] and last.score >= 1
    assert others[-1].failure.text == "TimeoutError: the database"  # the reward's own, not the deadline


def test_calls_beside_one_that_ends_or_blocks_their_process_are_scored(pool):
    assert kinds(pool.score(asking(["parts", "exit", "parts", "none"]))) == [0.5, "died", 0.5, None]
    pool._seconds, before = 0.1, pool._seconds
    try:
        assert kinds(pool.score(asking(["parts", "block", "parts"]))) == [0.5, "timed_out", 0.5]
    finally:
        pool._seconds = before


def test_an_async_reward_may_be_of_a_class_and_run_here_even_inside_an_event_loop():
    reward = in_process(async_rewards.Slow())
    assert is_async(reward) and is_async(async_rewards.obey)

    async def notebook():
        with RewardPool(reward) as pool:
            return pool.score(asking(["four"]))

    assert kinds(asyncio.run(notebook())) == [4.0]
