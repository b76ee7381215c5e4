"""Mistakes in what the adapters of other frameworks share."""

from typing import Any

from planted import Replacement

T = "tests/adapters/test_weighing.py::"
TOOLS = "tests/adapters/test_tool_tokens.py::"
PADDING = f"{T}test_what_stands_in_padding_has_no_effect"


def _multiplied(right: Any) -> Any:
    def ask(objective: Any, tokens: Any) -> Any:
        from drpo.types import TokenLoss

        return TokenLoss(objective(tokens).loss * tokens.keep)

    return ask


def _unscored_as_it_is(right: Any) -> Any:
    return lambda logp, behavior_logp, keep: behavior_logp.where(keep.bool(), logp.detach())


def _of_tools_too(right: Any) -> Any:
    def tokens(objective: Any, logp: Any, behavior_logp: Any, advantage: Any, keep: Any, sequence: Any) -> Any:
        return right(objective, logp, behavior_logp, advantage, keep | True, sequence)

    return tokens


def _never_asked(right: Any) -> Any:
    return lambda self, who: self._figures


REPLACEMENTS = (
    Replacement(
        "a step that bypassed the loss is not noticed",
        "drpo.adapters.record:LossRecord.take",
        _never_asked,
        (
            "tests/adapters/test_record.py::test_a_record_is_taken_once",
            "tests/adapters/test_open_instruct.py::test_a_trainer_that_calls_another_loss_stops_at_its_first_sample",
            "tests/adapters/test_unsloth.py::test_a_trainer_that_computes_its_loss_elsewhere_stops",
            "tests/adapters/test_areal.py::test_an_update_that_bypasses_the_loss_stops",
            "tests/adapters/test_swift.py::test_a_trainer_that_computes_its_loss_elsewhere_stops",
        ),
    ),
    Replacement(
        "a step's metrics are not asked whether the loss ran",
        "drpo.adapters.record:require_ran",
        lambda right: lambda metrics, objective: None,
        (
            "tests/adapters/test_record.py::test_metrics_of_another_loss_or_another_objective_are_refused",
            "tests/adapters/test_prime_rl.py::test_a_step_with_another_loss_is_noticed",
            "tests/adapters/test_nemo_rl.py::test_a_step_with_the_frameworks_own_loss_is_noticed",
        ),
    ),
    Replacement(
        "an adapter takes what tools wrote for a part of the sequence",
        "drpo.adapters.weighing:_tokens",
        _of_tools_too,
        (
            f"{TOOLS}test_tokens_of_tools_have_no_part_in_it[gspo(0.1, 0.1)-reweighted]",
            f"{TOOLS}test_tokens_of_tools_have_no_part_in_it[drpo(0.2)-in_prime_rl]",
            f"{TOOLS}test_a_sequence_is_the_sampled_tokens_of_the_episode",
        ),
    ),
    Replacement(
        "the advantage is not divided by the ratio that the framework multiplies with",
        "drpo.adapters.weighing:MAX_EXPONENT",
        lambda right: 0.0,
        (f"{T}test_reweighted_surrogate_has_the_objectives_gradient",),
    ),
    Replacement(
        "the loss is multiplied by the mask",
        "drpo.adapters.weighing:ask",
        _multiplied,
        (f"{PADDING}[nan-drpo(0.2)]",),
    ),
    Replacement(
        "a token that the sampler could not score is trained with NaN",
        "drpo.adapters.weighing:behavior_or_policy",
        _unscored_as_it_is,
        (f"{T}test_a_token_that_the_sampler_could_not_score_is_taken_as_on_policy",),
    ),
    Replacement(
        "what vLLM's server sends for a missing log-probability is taken for one",
        "drpo.adapters.weighing:UNREPORTED",
        lambda right: -1e9,
        (f"{T}test_a_token_that_the_sampler_could_not_score_is_taken_as_on_policy[-9999.0]",),
    ),
)
