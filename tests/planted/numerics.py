"""Mistakes in numbers that are tiny, infinite, or not what they are taken for."""

from typing import Any

from planted import Replacement

LOSS = "tests/test_policy_loss.py::"
EDGES = "tests/test_edges.py::"
COMPACT = "tests/test_compact_adamw.py::"


def plain_product(right: Any) -> Any:
    """A 16-bit product of the tokens' factors as they are."""
    del right
    import torch

    return lambda hidden, factor: ((hidden * factor[:, None]).to(hidden.dtype), torch.ones(1))


def squared(right: Any) -> Any:
    """What is small beside the largest of its block becomes 0, as its square would."""

    def write(parts: Any, mean: Any, square: Any) -> None:
        right(parts, mean, square)
        if len(parts) == 4:
            parts[2][square < 4e-4 * square.max()] = 0  # `square` is its own root by now

    return write


REPLACEMENTS = (
    Replacement(
        "a token's factor is rounded to 16 bits as it is",
        "drpo.ops.chunked:_normalised",
        plain_product,
        (f"{LOSS}test_a_tiny_token_weight_costs_nothing_in_16_bits",),
    ),
    Replacement(
        "the trainer takes fp16",
        "drpo.train.config.checks:require",
        lambda right: lambda fine, name, value, rule: right(fine or value == "fp16", name, value, rule),
        ("tests/test_train.py::test_a_configuration_that_cannot_be_is_refused_by_name",),
    ),
    Replacement(
        "a probability of 0 is taken as its logarithm",
        "drpo.objectives.ratios:LOWEST_LOGP",
        lambda right: float("-inf"),
        (f"{EDGES}test_probabilities_of_0_give_the_limit",),
    ),
    Replacement(
        "a second derivative is 0",
        "drpo.objectives.closed_form:_NoSecond.backward",
        lambda right: lambda ctx, *grads: (None, None),
        (f"{EDGES}test_a_second_derivative_is_refused",),
    ),
    Replacement(
        "every objective is skippable",
        "drpo.objectives.contract:vanishes_at_zero_advantage",
        lambda right: lambda objective: True,
        (f"{EDGES}test_what_moves_at_zero_advantage_is_never_skipped",),
    ),
    Replacement(
        "rounding is a signal",
        "drpo.checks:SAME",
        lambda right: 0.0,
        (f"{EDGES}test_rounding_is_no_signal",),
    ),
    Replacement(
        "values of columns are not looked at",
        "drpo.checks:_require_values",
        lambda right: lambda where, columns, keep: None,
        (f"{EDGES}test_a_column_that_cannot_be_is_refused",),
    ),
    Replacement(
        "anything is an objective",
        "drpo.objectives.contract:require_objective",
        lambda right: lambda objective: None,
        (f"{EDGES}test_what_is_no_objective_gets_one_sentence_everywhere",),
    ),
    Replacement(
        "token ids are not looked at",
        "drpo.ops:_require_ids",
        lambda right: lambda *given: None,
        (f"{EDGES}test_wrong_ids_and_swapped_most_probable_tokens_are_refused",),
    ),
    Replacement(
        "a mean ratio off by half a standard error is an alarm",
        "drpo.objectives.diagnosis:SIGMAS",
        lambda right: 0.5,
        (f"{EDGES}test_diagnose_finds_what_is_wrong_and_no_more",),
    ),
    Replacement(
        "adapters train on any number of broken log-probabilities",
        "drpo.adapters.weighing:MOST_BROKEN",
        lambda right: 1.0,
        (f"{EDGES}test_adapters_stop_at_a_thousandth_of_broken_log_probabilities",),
    ),
    Replacement(
        "bf16 weights are rounded to the nearest",
        "drpo.train.compact_adamw:round_stochastically",
        lambda right: lambda x, generator: x.bfloat16(),
        (f"{COMPACT}test_steps_too_small_for_bfloat16_are_taken_on_average",),
    ),
    Replacement(
        "of the second moment the square is held in 8 bits",
        "drpo.train.compact_adamw:_write",
        squared,
        (f"{COMPACT}test_a_small_moment_beside_a_large_one_makes_no_large_step",),
    ),
    Replacement(
        "every step rounds by the same numbers",
        "drpo.train.compact_adamw:derive",
        lambda right: lambda *parts: 0,
        (f"{COMPACT}test_rounding_depends_on_seed_place_and_step_alone",),
    ),
)
