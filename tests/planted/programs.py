"""Mistakes in tests of programs, in finding the program, in a reward's answers, and in prompts.

What happens inside the sandbox is patched as text: its interpreter has no way to find a replacement.
"""

from typing import Any

from planted import Bug, Replacement

CODE = "tests/test_code_tests.py::"
REWARDS = "tests/test_rewards.py::"
PROMPTS = "tests/test_prompts.py::"

FORMS = f"{CODE}test_every_form_is_run"
NOTHING = f"{CODE}test_what_tests_nothing_or_is_not_known_is_an_error"
RUNS = f"{CODE}test_what_shows_only_when_it_runs_is_an_error_too"
TRICKS = f"{CODE}test_tests_are_not_skipped_or_satisfied_by_a_trick"
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


REPLACEMENTS = (
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
        "drpo.rewards.worker:unpack_answer",
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

BUGS = (
    Bug(
        20,
        "many tests do not fit into the verdict",
        "rewards/sandboxed.py",
        'b"".join(passed[1:])',
        'b"".join(passed[1:10_900])',
        (f"{CODE}test_many_tests_and_much_output_arrive",),
    ),
    Bug(20, "tracing is allowed", "rewards/sandboxed.py", '    "sys.settrace",\n', "", (TRICKS,)),
    Bug(
        20,
        "an object that is equal to anything passes",
        "rewards/sandboxed.py",
        "        if any_equal:",
        "        if False:",
        (TRICKS,),
    ),
    Bug(
        20,
        "assertions that ran are not counted",
        "rewards/sandboxed.py",
        'b"1" if count or test is None else b"-"',
        'b"1"',
        (RUNS,),
    ),
)
