"""Mistakes about rewards that wait: async ones, and those of endpoints."""

from planted import Replacement

ASYNC = "tests/test_async_rewards.py::test_"

REPLACEMENTS = (
    Replacement(
        "async rewards are awaited one after the other",
        "drpo.rewards.scoring:concurrency",
        lambda right: lambda reward: 1,
        (f"{ASYNC}as_many_calls_are_awaited_at_once_as_the_reward_allows",),
    ),
    Replacement(
        "a process that dies takes the scores of all calls that it awaits",
        "drpo.rewards.pool:_answers",
        lambda right: lambda answer, places: True,
        (f"{ASYNC}calls_beside_one_that_ends_or_blocks_their_process_are_scored",),
    ),
    Replacement(
        "an async reward's own TimeoutError is a missed deadline",
        "drpo.rewards.scoring:_failure_of",
        lambda right: lambda error: right(error) if not isinstance(error, TimeoutError) else None,
        (f"{ASYNC}a_call_that_fails_or_is_late_costs_its_own_score_only_and_order_is_kept",),
    ),
)
