"""Mistakes in tests of programs and their sandbox, in finding the program, in a reward's answers, and in prompts.

The sandbox's own interpreter has no way to find a replacement: what it is told is replaced.
"""

from typing import Any

from planted import Replacement

CODE = "tests/test_code_tests.py::"
REWARDS = "tests/test_rewards.py::"
PROGRAMS = "tests/test_python_tests.py::"
PROMPTS = "tests/test_prompts.py::"

FORMS = f"{CODE}test_every_form_is_run"
NOTHING = f"{CODE}test_what_tests_nothing_or_is_not_known_is_an_error"
RUNS = f"{CODE}test_what_shows_only_when_it_runs_is_an_error_too"
FOUND = f"{CODE}test_the_program_is_found"


def _whole_text(right: Any) -> Any:
    """Tests are one program, whatever they look like."""
    return lambda given: given


def _first_block(right: Any) -> Any:
    return lambda blocks, what: next((b for b in blocks if getattr(b, what)), None)


def _first_fence(right: Any) -> Any:
    def end(lines: list[str], start: int, fence: str) -> int:
        return next((i for i in range(start, len(lines)) if lines[i].strip().startswith(fence)), len(lines))

    return end


def _no_limit(right: Any) -> Any:
    return lambda self, prompt_ids, sampling: False


def _with_ending(right: Any) -> Any:
    return lambda tokenizer, text: tokenizer(text)["input_ids"]


def _any_seal(right: Any) -> Any:
    def unpack(line: bytes, seal: str | None) -> Any:
        import json

        record = json.loads(line)
        return right(json.dumps({**record, "seal": seal or "x"}).encode(), seal or "x")

    return unpack


def _no_calls(right: Any) -> Any:
    return lambda tree, entry: []


def _told(**other: Any) -> Any:
    """A sandbox that is told something else."""
    return lambda right: lambda job, folder: right(job | other, folder)


def _any_one(right: Any) -> Any:
    return lambda *given: [True] * len(found) if any(found := right(*given)) else found


def _whatever_it_says(right: Any) -> Any:
    return lambda self, suite, *given: right(self, suite, *given) or [True] * len(suite)


def _any_number(right: Any) -> Any:
    return lambda value: (float(value), None)


REPLACEMENTS = (
    Replacement(
        "programs run without namespaces",
        "drpo.rewards.python:_started",
        _told(isolated=False),
        (f"{PROGRAMS}test_files_elsewhere_can_be_read_and_not_written",),
    ),
    Replacement(
        "programs may take any memory",
        "drpo.rewards.python:_started",
        _told(memory_mb=1 << 13),
        (f"{PROGRAMS}test_memory_is_limited",),
    ),
    Replacement(
        "ending without an error passes",
        "drpo.rewards.python:PythonTests._asserted",
        _whatever_it_says,
        (f"{PROGRAMS}test_success_cannot_be_faked_by_ending_early",),
    ),
    Replacement(
        "any one test is enough",
        "drpo.rewards.python:PythonTests._asserted",
        _any_one,
        (f"{PROGRAMS}test_right_wrong_and_partly_right",),
    ),
    Replacement(
        "NaN is a score",
        "drpo.rewards.scoring:_read",
        _any_number,
        (f"{REWARDS}test_a_declared_reward_runs_here_with_the_same_outcomes",),
    ),
    Replacement(
        "a reward has no memory limit",
        "drpo.workers.serve:_limit_memory",
        lambda right: lambda memory: None,
        (f"{REWARDS}test_every_misdeed_costs_its_own_mark_only_and_order_is_kept",),
    ),
    Replacement("JSON of tests is taken for a program", "drpo.rewards.suites:_decoded", _whole_text, (FORMS,)),
    Replacement("tests that are only defined are not called", "drpo.rewards.assertions:_calls", _no_calls, (FORMS,)),
    Replacement(
        "an assertion is whatever is there",
        "drpo.rewards.assertions:_is_assertion",
        lambda right: lambda node: True,
        (NOTHING, RUNS),
    ),
    Replacement(
        "tests that an empty program passes pay",
        "drpo.rewards.python:_passes_by_itself",
        lambda right: lambda reward, suite: False,
        (RUNS,),
    ),
    Replacement(
        "outputs are compared without their lines",
        "drpo.rewards.suites:same_output",
        lambda right: lambda found, expected: found.split() == expected.split(),
        (f"{CODE}test_answers_are_compared_as_benchmarks_do",),
    ),
    Replacement("the first block that defines something counts", "drpo.rewards.fences:_last", _first_block, (FOUND,)),
    Replacement(
        "the last definition is the program, whatever is tested",
        "drpo.rewards.suites:Suite.wanted",
        lambda right: frozenset(),
        (
            f"{CODE}test_the_program_is_found_by_what_the_tests_use",
            f"{CODE}test_all_that_the_tests_use_is_in_the_program",
        ),
    ),
    Replacement("a fence inside a docstring ends the block", "drpo.rewards.fences:_end", _first_fence, (FOUND,)),
    Replacement(
        "an answer without its item's seal counts",
        "drpo.workers.serve:unseal",
        _any_seal,
        (f"{REWARDS}test_every_misdeed_costs_its_own_mark_only_and_order_is_kept",),
    ),
    Replacement(
        "a tokenizer's EOS ends the prompt",
        "drpo.rollout.prompts:_unended",
        _with_ending,
        (f"{PROMPTS}test_what_a_tokenizer_appends_is_not_part_of_the_prompt",),
    ),
    Replacement(
        "a prompt may be longer than the model's positions",
        "drpo.rollout.prompts:PromptLimits.too_long",
        _no_limit,
        (
            f"{PROMPTS}test_a_prompt_that_the_model_cannot_read_is_refused_by_its_problem",
            f"{PROMPTS}test_long_prompts_are_dropped_counted_and_replaced",
        ),
    ),
    Replacement(
        "half a character is read from a file",
        "drpo.tasks.rows:_HALF",
        lambda right: __import__("re").compile("(?!)"),
        (f"{PROMPTS}test_half_a_character_in_a_file_is_refused_by_its_line",),
    ),
)
