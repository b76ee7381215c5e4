"""Mistakes in advantages, in the weights of tokens, in batches, and in what is packed into one row."""

from dataclasses import replace
from typing import Any

from planted import Replacement

GROUPS = "tests/test_advantages_reductions.py::"
BATCH = "tests/test_batch_policy.py::"
PACKING = "tests/test_packing.py::"
CRITIC = "tests/test_critic.py::"

DEFINITION = f"{GROUPS}test_advantage_is_its_definition"
WEIGHT = f"{GROUPS}test_weight_is_its_definition"
GOLDEN_WEIGHTS = f"{GROUPS}test_golden_weights"
SAME = f"{PACKING}test_packed_padded_and_one_by_one_are_the_same"
WINDOWED = f"{SAME}[mistral, window 4]"
ANY_LAYOUT = f"{PACKING}test_any_layout"
FEELS = f"{PACKING}test_a_position_feels_what_it_sees_and_nothing_else"
TRAINED_IDS = f"{BATCH}test_trained_ids_are_the_sampled_ids"
PLAIN_LOGP = f"{BATCH}test_logp_and_entropy_are_the_plain_models"
ANCHOR = f"{BATCH}test_the_anchor_is_what_the_sampler_reported_through_all_updates"
MICRO_BATCHES = f"{BATCH}test_any_micro_batches_give_the_same_update"


def _without_boundaries(right: Any) -> Any:
    def of(layout: Any, device: Any) -> Any:
        from drpo.types import Layout

        return right(Layout((layout.n_positions,), (-1,)), device)

    return of


def _wider(right: Any) -> Any:
    return lambda bucket, buckets, window: right(bucket, buckets, None if window is None else window + 1)


def _rounded_anchor(right: Any) -> Any:
    def micro_batch(rows: Any) -> Any:
        micro = right(rows)
        return replace(micro, behavior_logp=micro.behavior_logp.bfloat16().float())

    return micro_batch


def _own_mean(right: Any) -> Any:
    def micro_batch(rows: Any) -> Any:
        micro = right(rows)
        return replace(micro, weight=micro.weight * 8 / len(rows))

    return micro_batch


def _itself(right: Any) -> Any:
    return lambda *given: [(positions + 1).clamp(max=int(positions.max())) for positions in right(*given)]


def _anchored_to_itself(right: Any) -> Any:
    return lambda self, logp, divergence=None: replace(right(self, logp, divergence), behavior_logp=logp.detach())


def _across_completions(right: Any) -> Any:
    return lambda reward, value, sequence, gamma, lam: right(reward, value, sequence * 0, gamma, lam)


REPLACEMENTS = (
    Replacement(
        "an advantage has no baseline",
        "drpo.credit.advantages:_centered",
        lambda right: lambda rewards: rewards.double(),
        (DEFINITION, f"{GROUPS}test_golden_advantages"),
    ),
    Replacement(
        "equal rewards leave rounding noise, and zscore blows it up",
        "drpo.credit.advantages:_centered",
        lambda right: lambda rewards: (rewards - rewards.mean()).double(),
        (f"{GROUPS}test_constant_group_has_exactly_zero_advantage[zscore]",),
    ),
    Replacement(
        "advantages are not divided by what they are measured in",
        "drpo.credit.advantages:_quotient",
        lambda right: lambda centered, divisor: centered,
        (f"{DEFINITION}[zscore]", f"{DEFINITION}[maxrl]"),
    ),
    Replacement(
        "completions touch in a critic's advantages",
        "drpo.credit.rules:gae",
        _across_completions,
        (f"{CRITIC}test_a_critic_credits_each_token_with_its_advantage",),
    ),
    Replacement(
        "masked tokens count in the lengths of completions",
        "drpo.reductions:_lengths",
        lambda right: lambda keep, sequence: right(keep | True, sequence),
        (WEIGHT, GOLDEN_WEIGHTS),
    ),
    Replacement(
        "masked tokens have a weight",
        "drpo.reductions:_weights",
        lambda right: lambda keep, divisor: right(keep | True, divisor),
        (WEIGHT, GOLDEN_WEIGHTS),
    ),
    Replacement(
        "a horizon is divided by the number of completions once more",
        "drpo.reductions:Horizon.__call__",
        lambda right: lambda self, keep, sequence: right(self, keep, sequence) / len(sequence.unique()),
        (WEIGHT, GOLDEN_WEIGHTS),
    ),
    Replacement(
        "each micro-batch is divided by its own number of rows",
        "drpo.batch:_micro_batch",
        _own_mean,
        (f"{MICRO_BATCHES}[drpo]", f"{BATCH}test_weights_sum_to_what_the_reduction_says"),
    ),
    Replacement(
        "the anchor is rounded to bfloat16 on its way",
        "drpo.batch:_micro_batch",
        _rounded_anchor,
        (ANCHOR, TRAINED_IDS),
    ),
    Replacement("the policy itself is the anchor", "drpo.types:MicroBatch.tokens", _anchored_to_itself, (ANCHOR,)),
    Replacement(
        "each token is predicted from itself", "drpo.batch:_add_prompt", _itself, (TRAINED_IDS, f"{PLAIN_LOGP}[1.0]")
    ),
    Replacement(
        "answers count their positions from 0",
        "drpo.types:Layout.prefix_length",
        lambda right: lambda self, segment: 0,
        (TRAINED_IDS, SAME),
    ),
    Replacement(
        "rows are packed into one without a boundary", "drpo.model.packing:Packing.of", _without_boundaries, (SAME,)
    ),
    Replacement(
        "a position sees the whole bucket",
        "drpo.model.packing:_visible",
        lambda right: lambda bucket, buckets, window: right(bucket, buckets, window) | True,
        (SAME, FEELS),
    ),
    Replacement("the window is one position too wide", "drpo.model.packing:_visible", _wider, (WINDOWED,)),
    Replacement(
        "padding has a gradient",
        "drpo.model.packing:_to_slots",
        lambda right: lambda x, packing: x.index_select(0, packing.position),
        (SAME, ANY_LAYOUT),
    ),
)
