"""Mistakes of PPO with a critic: in its advantages, its loss, where its values are read, and what a run keeps of it."""

from collections.abc import Callable, Sequence
from typing import Any

from planted import Replacement

T = "tests/test_critic.py::"
WHITENED = f"{T}test_whitened_advantages_have_mean_0_and_deviation_1"
CREDITED = f"{T}test_a_critic_credits_each_token_with_its_advantage"
RESUMED = f"{T}test_cut_off_and_resumed_it_is_one_run_bit_for_bit"
RECORDED = f"{T}test_rollouts_record_what_each_token_was_worth"
TWO = "tests/test_ranks.py::test_more_processes_are_one_run[2-critic-none]"
SKIPPED = f"{T}test_a_broken_update_of_the_critic_is_skipped_and_counted"
ENDED = f"{T}test_a_critic_that_stays_broken_ends_the_run"


def _counts_the_policys(right: Callable[..., int]) -> Callable[..., int]:
    def wrong(session: Any, whose: str, skipped: int, updates: Sequence[Any]) -> int:
        return right(session, whose, skipped, updates if whose == "policy" else ())

    return wrong


REPLACEMENTS = (
    Replacement(
        "equal advantages are divided by a deviation of 0",
        "drpo.credit.gae:all_equal",
        lambda right: lambda values: values.numel() == 0,
        (WHITENED,),
    ),
    Replacement(
        "advantages of a critic are not whitened",
        "drpo.credit.rules:whitened",
        lambda right: lambda advantage: advantage,
        (f"{CREDITED}[True]", RECORDED),
    ),
    Replacement(
        "nobody counts the critic's skipped updates",
        "drpo.train.run_session:RunSession._count_skipped",
        _counts_the_policys,
        (SKIPPED, ENDED),
    ),
    Replacement(
        "a record says the mean of a completion's advantages alone",
        "drpo.train.log:advantage_record",
        lambda right: lambda advantage: {"advantage": right(advantage)["advantage"]},
        (RECORDED,),
    ),
    Replacement(
        "a resumed run begins with a new critic",
        "drpo.train.critic:CriticTrainer.restore",
        lambda right: lambda self, folder: None,
        (RESUMED,),
    ),
    Replacement(
        "each process keeps its own gradient of the critic",
        "drpo.model.critic:Critic.reduce_gradients",
        lambda right: lambda self, ranks: right(self, type(ranks)()),
        (TWO,),
    ),
)
