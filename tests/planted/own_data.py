"""Mistakes in what is guessed from a user's own data, and in recipes as files."""

from dataclasses import replace

from planted import Replacement

OWN = "tests/test_own_data.py::test_"

REPLACEMENTS = (
    Replacement(
        "own data has a limit of tokens that nothing was measured for",
        "drpo.recipes.own_data:Measured.max_new_tokens",
        lambda right: lambda measured: 32,
        (f"{OWN}nine_of_ten_answers_and_the_longest_reference_fit",),
    ),
    Replacement(
        "the horizon of a recipe's file stays where the limit of tokens changes",
        "drpo.cli.overrides:is_recipe_file",
        lambda right: lambda name: False,
        (f"{OWN}a_run_of_a_recipe_file_is_recorded_whole",),
    ),
    Replacement(
        "questions that are shown with their answers are trained and evaluated on",
        "drpo.tasks.records:without",
        lambda right: lambda questions, held_out, prefix: list(questions),
        ("tests/test_tasks.py::test_examples_are_neither_trained_nor_evaluated_on",),
    ),
    Replacement(
        "of several columns that may be meant the first is taken",
        "drpo.tasks.columns:_usual",
        lambda right: lambda columns, names: next(filter(None, (right([c], names) for c in columns)), None),
        (f"{OWN}columns_that_may_be_either_are_refused_in_a_line",),
    ),
    Replacement(
        "a full stop makes a reply wrong",
        "drpo.rewards.match:_AT_END",
        lambda right: "",
        (f"{OWN}a_reply_matches_by_itself_or_by_the_answer_that_it_marks",),
    ),
    Replacement(
        "a system message that a user writes is not listened to",
        "drpo.recipes.own_data:read_own",
        lambda right: lambda data: right(replace(data, system=None)),
        (f"{OWN}one_command_trains_on_own_data_and_records_what_was_guessed",),
    ),
)
