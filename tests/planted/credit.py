"""Mistakes between rewards and advantages: what is compared with what, and which tokens are credited with it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from planted import Replacement

T, BATCH = "tests/test_credit.py::", "tests/test_batch_policy.py::"
STEPS = f"{T}test_rewards_of_steps_are_compared_as_the_definition_says"
PROMPT_ALONE = f"{BATCH}test_a_reward_of_the_prompt_alone_teaches_nothing"
SKIPPING = f"{BATCH}test_skipping_zero_advantages_is_exact"
SUMS = "tests/test_reward_sums.py::"
GDPO = "tests/test_methods.py::test_the_gradient_of_a_batch_is_the_papers[gdpo]"
WEIGHTS = f"{BATCH}test_weights_sum_to_what_the_reduction_says"


def _compares_the_rollout(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(groups: Sequence[Any], values: Any = None, **settings: Any) -> Any:
        import torch

        whole = tuple(e for g in groups for e in g.episodes)
        everything = [replace(groups[0], episodes=whole, rewards=torch.cat([g.rewards for g in groups]))]
        return right(everything if groups else groups, values, **settings)

    return wrong


def _first_reward(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(rewards: Sequence[Any], *settings: Any) -> Any:
        return right([r[::-1] for r in rewards], *settings)

    return wrong


def _without_zeros(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(episodes: Sequence[Any], credit_of: Any, config: Any) -> Any:
        moving = [e for e in episodes if any(credit_of[s].advantage.any() for s in e.sequences)]
        return right(moving or episodes, credit_of, config)

    return wrong


def _sums_first(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(rewards: Any, weights: Any = None) -> Any:
        return right(rewards if weights is None else weights.double() @ rewards)

    return wrong


REPLACEMENTS = (
    Replacement(
        "the rewards of a sum are added before they are normalised",
        "drpo.credit.advantages:gdpo",
        _sums_first,
        (f"{SUMS}test_parts_that_differ_are_a_signal_where_the_sums_are_equal", GDPO),
    ),
    Replacement(
        "a reward is normalised over the parts of one completion",
        "drpo.credit.advantages:_standardised",
        lambda right: lambda rewards: right(rewards.mT).mT if rewards.ndim == 2 else right(rewards),
        (GDPO,),
    ),
    Replacement(
        "the weights of a sum are lost on the way to the advantage",
        "drpo.credit.rules:weighted_parts",
        lambda right: lambda *settings, **more: (right(*settings, **more)[0], right(*settings, **more)[1] ** 0),
        (GDPO,),
    ),
    Replacement(
        "a sum's advantage is normalised within each group",
        "drpo.credit.rules:_decoupled",
        lambda right: lambda groups: [c for g in groups for c in right([g])],
        (GDPO,),
    ),
    Replacement(
        "groups of equal sums are sampled again, whatever their parts",
        "drpo.credit.rules:teaches_nothing",
        lambda right: lambda group, advantage: group.equal_rewards,
        (f"{SUMS}test_dynamic_sampling_keeps_the_groups_that_have_an_advantage",),
    ),
    Replacement(
        "masked completions are trained",
        "drpo.credit.rules:_trained",
        lambda right: lambda groups, credits: list(credits),
        ("tests/test_methods.py::test_a_masked_completion_counts_in_its_group_and_is_not_trained",),
    ),
    Replacement(
        "advantages are whitened within each group",
        "drpo.credit.rules:_whitened",
        lambda right: lambda credits: [c for i in range(0, len(credits), 4) for c in right(credits[i : i + 4])],
        ("tests/test_methods.py::test_the_gradient_of_a_batch_is_the_papers[reinforce++]",),
    ),
    Replacement(
        "a completion is compared with the whole rollout",
        "drpo.credit.rules:group_credit",
        _compares_the_rollout,
        (PROMPT_ALONE,),
    ),
    Replacement(
        "rewards of an episode's steps come in the wrong order",
        "drpo.credit.rules:step_advantages",
        _first_reward,
        (STEPS,),
    ),
    Replacement(
        "the normaliser leaves out completions of zero advantage",
        "drpo.batch:_batch",
        _without_zeros,
        (SKIPPING, WEIGHTS),
    ),
)
