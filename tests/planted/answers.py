"""Mistakes in how answers are read and compared."""

import re

from planted import Replacement

ANSWERS = "tests/test_answers.py::"
SUMS = "tests/test_reward_sums.py::"
REWARDS = "tests/test_rewards.py::"
TASKS = "tests/test_tasks.py::"
DOCTOR = "tests/test_doctor.py::"
SAME = f"{ANSWERS}test_the_same_answer_written_otherwise_scores_1"
DIFFERENT = f"{ANSWERS}test_another_answer_scores_0"
STATED = f"{ANSWERS}test_the_answer_is_found_where_the_text_states_it"
LAST = f"{ANSWERS}test_the_last_number_of_a_text"
SHARED = f"{ANSWERS}test_the_shared_cases_have_their_right_scores"


def first_number(text):
    """Read the first number of a text, whatever comes behind."""
    from drpo.rewards import number

    match = next(number._numbers(text), None)
    return number._value(match, number._is_sign(text, match)) if match else None


def _without_weights(right):
    def wrong(self, results):
        from dataclasses import replace

        return right(replace(self, terms=tuple(replace(term, weight=1.0) for term in self.terms)), results)

    return wrong


def _scored_zero(right):
    def wrong(self, scores):
        from dataclasses import replace

        from drpo.types import RewardResult

        return right(self, [replace(m, failure=None, result=m.result or RewardResult(0.0)) for m in scores])

    return wrong


REPLACEMENTS = (
    Replacement(
        "the weights of a sum of rewards are ignored",
        "drpo.rewards.weighted:WeightedSum._added",
        _without_weights,
        (f"{SUMS}test_each_term_is_a_part_before_its_weight", f"{SUMS}test_a_run_records_the_sum_and_each_part"),
    ),
    Replacement(
        "the parts of a sum have each other's names",
        "drpo.rewards.weighted:WeightedSum.names",
        lambda right: lambda self: right(self)[::-1],
        (f"{SUMS}test_each_term_is_a_part_before_its_weight", f"{SUMS}test_a_run_records_the_sum_and_each_part"),
    ),
    Replacement(
        "a reward of a sum that fails counts as 0",
        "drpo.rewards.weighted:WeightedSum.combined",
        _scored_zero,
        (f"{SUMS}test_where_a_part_fails_or_abstains_so_does_the_sum",),
    ),
    Replacement(
        "the minus of a sum is lost",
        "drpo.spec:_summand",
        lambda right: lambda factors, sign, plain: right(factors, abs(sign), plain),
        (f"{SUMS}test_a_sum_is_read_and_written_again", f"{SUMS}test_each_term_is_a_part_before_its_weight"),
    ),
    Replacement(
        "code within a sum is imported from any folder",
        "drpo.spec:_sums_code",
        lambda right: lambda text: False,
        (f"{SUMS}test_code_within_a_sum_is_not_imported_from_a_folder_that_is_not_trusted",),
    ),
    Replacement(
        "tags in any order are a format",
        "drpo.rewards.form:Format._in_order",
        lambda right: lambda self, text: True,
        (f"{SUMS}test_formats_are_held_strictly",),
    ),
    Replacement(
        "the length reward counts the first turn alone",
        "drpo.types.problem:Transcript.n_tokens",
        lambda right: lambda self: self.turns[0],
        (f"{SUMS}test_length_counts_tokens_of_all_turns",),
    ),
    Replacement(
        "the sign of an answer is lost",
        "drpo.rewards.number:_value",
        lambda right: lambda match, negative: right(match, False),
        (f"{REWARDS}test_exact_number_reads", LAST),
    ),
    Replacement(
        "a difference is read as a negative number",
        "drpo.rewards.number:_is_sign",
        lambda right: lambda text, match: bool(match["minus"]),
        (f"{REWARDS}test_exact_number_reads", LAST),
    ),
    Replacement(
        "only a minus that touches the number is a sign",
        "drpo.rewards.number:_is_sign",
        lambda right: lambda text, match: not match["gap"] and right(text, match),
        (LAST, SHARED),
    ),
    Replacement(
        "numbers are compared as floats",
        "drpo.rewards.number:read_number",
        lambda right: lambda text: None if right(text) is None else float(right(text)),
        (f"{REWARDS}test_exact_number_does_not_round",),
    ),
    Replacement(
        "the first number counts",
        "drpo.rewards.number:last_number",
        lambda right: first_number,
        (f"{REWARDS}test_exact_number_finds_the_last_number_however_it_is_written",),
    ),
    Replacement(
        "an answer that is not a number is a wrong answer",
        "drpo.rewards.number:read_number",
        lambda right: lambda text: right(text) or 0,
        (f"{REWARDS}test_exact_number_refuses_an_answer_that_is_not_a_number",),
    ),
    Replacement(
        "a power is the number before its exponent",
        "drpo.rewards.number:_power",
        lambda right: lambda base, exponent: base,
        (LAST, SHARED),
    ),
    Replacement(
        "the box is not preferred",
        "drpo.rewards.math:final_answer",
        lambda right: lambda text: None,
        (f"{REWARDS}test_math_verify_prefers_the_last_box_and_compares_by_value", STATED),
    ),
    Replacement(
        "any two boxes are a set",
        "drpo.rewards.extract:_joins",
        lambda right: lambda between: True,
        (STATED, SHARED),
    ),
    Replacement(
        "words are products of letters", "drpo.rewards.math:comparison", lambda right: lambda gold: None, (DIFFERENT,)
    ),
    Replacement("answers are not brought into normal form", "drpo.rewards.math:normalise", lambda right: str, (SAME,)),
    Replacement(
        "numbers that differ by less than 1e-15 are equal",
        "drpo.rewards.nearness:_near",
        lambda right: lambda a, b: True,
        (f"{DIFFERENT}[small numbers]",),
    ),
    Replacement(
        "decimals are compared to the sixth place only",
        "drpo.rewards.nearness:_decimals",
        lambda right: lambda number: 0,
        (f"{DIFFERENT}[small numbers]",),
    ),
    Replacement(
        "the reason of an answer belongs to it",
        "drpo.rewards.math:without_reason",
        lambda right: lambda answer: answer,
        (STATED,),
    ),
    Replacement(
        "inequalities joined by or are left as they are",
        "drpo.rewards.normalise:RULES",
        lambda right: tuple(rule for rule in right if "joined by or" not in rule.reason),
        (f"{SAME}[unions of inequalities]",),
    ),
    Replacement(
        "the degrees of an angle do not count under a sine",
        "drpo.rewards.normalise:RULES",
        lambda right: tuple(rule for rule in right if "under a sine" not in rule.reason),
        (f"{SAME}[degrees under a sine]",),
    ),
    Replacement(
        "roots are compared where they are not real",
        "drpo.rewards.nearness:equal_where_real",
        lambda right: lambda a, b: False,
        (f"{SAME}[roots of positive letters]",),
    ),
    Replacement(
        "a formula and its absolute value are equal",
        "drpo.rewards.nearness:equal_where_real",
        lambda right: lambda a, b: True,
        (f"{DIFFERENT}[roots]",),
    ),
    Replacement(
        "a list with dots is any list",
        "drpo.rewards.wording:_has_dots",
        lambda right: lambda dressed: False,
        (f"{DIFFERENT}[lists with dots]",),
    ),
    Replacement(
        "the base of a numeral does not matter",
        "drpo.rewards.wording:_same_in_base",
        lambda right: lambda gold, answer: gold[1] == answer[1],
        (f"{DIFFERENT}[bases]",),
    ),
    Replacement(
        "letters behind a number are a unit",
        "drpo.rewards.normalise:RULES",
        lambda right: (*right, right[0]._replace(pattern=re.compile(r"(?<=[0-9}])\s*[a-z]+$"))),
        (f"{DIFFERENT}[units]",),
    ),
    Replacement(
        "numbers of a row keep their exponent",
        "drpo.tasks.records:_digits",
        lambda right: lambda value: str(float(value)),
        (f"{TASKS}test_numbers_are_read_as_people_write_them",),
    ),
    Replacement(
        "an answer may be of any length",
        "drpo.rewards.math:_LONGEST",
        lambda right: 10**9,
        (f"{ANSWERS}test_a_loop_of_the_model_is_a_wrong_answer_that_is_not_read",),
    ),
    Replacement(
        "an answer may have any number of integrals",
        "drpo.rewards.math:_INTEGRALS",
        lambda right: 10**9,
        (f"{ANSWERS}test_integrals_without_end_are_not_read",),
    ),
    Replacement(
        "numbers of 32 bits have the digits of 64",
        "drpo.tasks.parquet:_as_written",
        lambda right: lambda table: table,
        (f"{TASKS}test_numbers_of_a_table_are_read_likewise[float32]",),
    ),
    Replacement(
        "no answer is mutated",
        "drpo.doctor.scoring:mutate",
        lambda right: lambda problems: [],
        (f"{DOCTOR}test_every_fault_of_a_reward_is_found_and_named",),
    ),
    Replacement(
        "a mutation may equal the answer",
        "drpo.doctor.mutation:_same",
        lambda right: lambda answer, other: False,
        (f"{DOCTOR}test_no_mutation_of_an_answer_is_right",),
    ),
)
