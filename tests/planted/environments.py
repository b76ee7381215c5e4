"""Mistakes with environments that run in worker processes."""

import math
from typing import Any

from planted import Replacement

POOL = "tests/test_environment_pool.py::"
FORGED = "tests/test_glue.py::test_tokens_that_begin_a_role_are_forged_by_none_whatever_the_tokenizer_calls_them"


def _last_call_alone(right: Any) -> Any:
    def wrong(self: Any, process: Any) -> bytes:
        self.process, self._made = process, len(self.calls) - 1
        return self.calls[-1]

    return wrong


REPLACEMENTS = (
    Replacement(
        "episodes of a killed process go on without the turns of before",
        "drpo.environments.pool:_Episode.next_call",
        _last_call_alone,
        (f"{POOL}test_every_misdeed_costs_its_episode_and_the_others_are_rebuilt",),
    ),
    Replacement(
        "an environment may answer whenever it likes",
        "drpo.workers.process:WorkerProcess.give",
        lambda right: lambda self, place, body, seconds: right(self, place, body, 100 * seconds),
        (f"{POOL}test_an_episode_that_does_not_open_is_a_failure",),
    ),
    Replacement(
        "whatever an environment returns is a result",
        "drpo.environments.answers:checked_result",
        lambda right: lambda value: value,
        (f"{POOL}test_lies_are_told_from_answers",),
    ),
    Replacement(
        "an answer may be nested without an end",
        "drpo.environments.answers:_deeper",
        lambda right: lambda value, levels: False,
        (f"{POOL}test_lies_are_told_from_answers",),
    ),
    Replacement(
        "a reward may be too large for float32",
        "drpo.environments.answers:is_reward",
        lambda right: math.isfinite,
        (f"{POOL}test_lies_are_told_from_answers",),
    ),
    Replacement(
        "a token that is special without a name begins a role",
        "drpo.rollout.chat_template:special_tokens",
        lambda right: lambda tokenizer: dict.fromkeys(tokenizer.all_special_tokens, 0),
        (FORGED,),
    ),
    Replacement(
        "a token that the template puts between turns begins a role",
        "drpo.rollout.chat_template:_between_turns",
        lambda right: lambda tokenizer, template: frozenset(),
        (FORGED,),
    ),
    Replacement(
        "an episode may be rebuilt into another one",
        "drpo.environments.pool:same",
        lambda right: lambda one, other: True,
        (f"{POOL}test_an_episode_that_is_rebuilt_otherwise_is_a_failure_that_says_so",),
    ),
)
