"""Mistakes in the warm-up, and in what a run of fine-tuning goes on with."""

from typing import Any

from planted import Replacement

HERE = "tests/test_warm_up.py::"
SFT = "tests/test_sft.py::"
SELECTED = f"{HERE}test_right_whole_and_different_answers_are_learnt_from_and_counted"
RESUMED = f"{HERE}test_interrupted_anywhere_it_is_one_run_bit_for_bit"


def _takes_cut_ones(right: Any) -> Any:
    return lambda self, records: right(self, [{**record, "finish_reason": "stop"} for record in records])


def _fills_up(right: Any) -> Any:
    def at_step(groups: Any, batch: int, step: int, seed: int) -> Any:
        from drpo.train.sft.data import _order

        places = (divmod(step * batch + slot, len(groups)) for slot in range(batch))
        return [groups[_order(len(groups), seed, epoch)[i]] for epoch, i in places]

    return at_step


REPLACEMENTS = (
    Replacement(
        "the warm-up learns from answers that were cut",
        "drpo.train.own_answers:Selection._add",
        _takes_cut_ones,
        (SELECTED,),
    ),
    Replacement(
        "the warm-up learns from an answer as often as it was given",
        "drpo.train.own_answers:_ids",
        lambda right: lambda record: (object(),),
        (SELECTED,),
    ),
    Replacement(
        "a warm-up that goes on appends to half an answer",
        "drpo.train.own_answers:truncate",
        lambda right: lambda path, size: None,
        (RESUMED,),
    ),
    Replacement(
        "adapters of a run with a warm-up are exported for the model before it",
        "drpo.cli.trained:started",
        lambda right: lambda run, folder: run,
        ("tests/test_warm_up.py::test_untrained_is_the_model_before_the_warm_up_and_adapters_belong_to_the_one_after",),
    ),
    Replacement(
        "RL begins with the model before its warm-up",
        "drpo.train.warm_up:started",
        lambda right: lambda run, folder: run,
        (f"{HERE}test_rl_is_that_of_the_warmed_up_model",),
    ),
    Replacement(
        "a warm-up learns from answers that were changed since",
        "drpo.train.warm_up:require_written",
        lambda right: lambda path, tally: None,
        (f"{HERE}test_answers_that_are_not_what_was_written_are_refused",),
    ),
    Replacement(
        "a run from a warm one warms up again",
        "drpo.cli.start:_without_warm_up",
        lambda right: lambda run: run,
        (f"{HERE}test_a_run_from_a_warm_one_does_not_warm_up_again",),
    ),
    Replacement(
        "an update of fine-tuning is filled up from the next epoch, perhaps with a conversation that it has",
        "drpo.train.sft.data:at_step",
        _fills_up,
        (f"{SFT}test_the_updates_of_an_epoch_are_equal_and_have_no_conversation_twice",),
    ),
    Replacement(
        "a lengthened run of fine-tuning has no chapter",
        "drpo.train.sft.session:chapters_of",
        lambda right: lambda folder, config, step, evaluates: [],
        (f"{SFT}test_lengthened_it_is_one_long_run_and_a_changed_rate_is_a_chapter",),
    ),
)
