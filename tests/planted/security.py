"""Mistakes that let somebody in."""

import os
import re
import sys
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

from planted import Replacement

FILES = "tests/test_files.py::"
STRANGERS = "tests/test_strangers.py::"
CLIENT = "tests/test_vllm_client.py::"


@contextmanager
def _through(path: Any) -> Any:
    with path.open("wb") as file:
        yield file


@contextmanager
def _half(path: Any) -> Any:
    with open(f"{path}.writing", "wb") as file:
        yield file


def _here_first(right: Any) -> Any:
    def wrong(*arguments: Any) -> Any:
        sys.path.insert(0, os.getcwd())
        return right(*arguments)

    return wrong


def _asking(right: Any) -> Any:
    def wrong(source: Any, trust_remote_code: bool, **options: Any) -> Any:
        return right.from_pretrained(source, **options)

    return SimpleNamespace(from_pretrained=wrong)


def _open(right: Any) -> Any:
    async def wrong(self: Any, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    return wrong


def _but_hard_links(right: Any) -> Any:
    def wrong(path: Any) -> None:
        with suppress(OSError):
            if os.lstat(path).st_nlink > 1:
                return
        right(path)

    return wrong


REPLACEMENTS = (
    Replacement(
        "a picture warns of letters that its font lacks, as they are",
        "drpo.files:save_figure",
        lambda right: lambda figure, path, **options: figure.savefig(path, **options),
        (f"{FILES}test_a_name_in_a_picture_does_not_reach_the_terminal",),
    ),
    Replacement(
        "files are written through links",
        "drpo.files:replacing",
        lambda right: _through,
        (f"{FILES}test_a_run_replaces_the_links_in_its_folder", f"{FILES}test_a_picture_replaces_a_link"),
    ),
    Replacement(
        "what is half written is left",
        "drpo.files:replacing",
        lambda right: _half,
        (f"{FILES}test_nothing_half_written_is_left",),
    ),
    Replacement(
        "logs and locks are opened through links",
        "drpo.files:opened_here",
        lambda right: lambda path, flags: os.open(path, flags, 0o666),
        (
            f"{FILES}test_what_grows_is_not_opened_through_a_link",
            f"{FILES}test_a_run_does_not_begin_where_what_grows_is_a_link",
        ),
    ),
    Replacement(
        "checkpoints are written into a folder that is a link",
        "drpo.files:require_own",
        lambda right: lambda folder: None,
        (
            f"{FILES}test_a_run_does_not_begin_where_what_grows_is_a_link",
            f"{FILES}test_a_trial_that_is_a_link_is_not_written_to",
        ),
    ),
    Replacement(
        "every command looks for modules in the working folder first",
        "drpo.cli:main",
        _here_first,
        (f"{STRANGERS}test_a_command_does_not_look_for_modules_in_the_working_folder",),
    ),
    Replacement(
        "one's own code comes before all libraries",
        "drpo.spec:import_named",
        _here_first,
        (f"{STRANGERS}test_ones_own_code_is_found_in_the_working_folder_and_after_all_libraries",),
    ),
    Replacement(
        "transformers asks whether a tokenizer's own code may run",
        "drpo.model.loading:AutoTokenizer",
        _asking,
        (f"{STRANGERS}test_a_model_that_brings_its_own_code_is_refused_and_nobody_is_asked",),
    ),
    Replacement(
        "records steer the terminal",
        "drpo.errors:printable",
        lambda right: lambda text: text,
        (
            f"{STRANGERS}test_nothing_that_a_record_says_steers_the_terminal",
            f"{STRANGERS}test_what_a_library_logs_cannot_steer",
        ),
    ),
    Replacement(
        "passwords are recorded",
        "drpo.credentials:without_password",
        lambda right: lambda text: text,
        (f"{STRANGERS}test_a_password_is_recorded_nowhere_and_sent",),
    ),
    Replacement(
        "a password ends at a comma, a space or a slash",
        "drpo.credentials:_USER",
        lambda right: re.compile(r"(https?://)([^/\s,]*)@", re.IGNORECASE),
        (f"{STRANGERS}test_a_password_may_hold_anything",),
    ),
    Replacement(
        "the command line keeps its password, which trackers record",
        "drpo.cli:without_password",
        lambda right: lambda text: text,
        (f"{STRANGERS}test_a_password_does_not_stay_in_the_arguments_that_trackers_record",),
    ),
    Replacement(
        "a server that echoes a request is quoted with its password",
        "drpo.rollout.server:without_secrets",
        lambda right: lambda text: text,
        (f"{CLIENT}test_what_a_server_echoes_of_a_request_is_quoted_without_its_secrets",),
    ),
    Replacement(
        "whoever reaches a server may call it",
        "drpo.rollout.gate:Gate.__call__",
        _open,
        (f"{CLIENT}test_the_gate_lets_in_who_knows_the_token_to_what_drpo_calls",),
    ),
    Replacement(
        "a token allows every method of the workers",
        "drpo.rollout.gate:_method",
        lambda right: lambda body: "drpo_dtype",
        (f"{CLIENT}test_the_gate_lets_in_who_knows_the_token_to_what_drpo_calls",),
    ),
    Replacement(
        "a server listens on every network",
        "drpo.cli.listening:require_loopback",
        lambda right: lambda *arguments: None,
        (f"{CLIENT}test_a_server_listens_on_this_machine_alone",),
    ),
    Replacement(
        "a server's answer may be of any size",
        "drpo.rollout.server:Server._read",
        lambda right: lambda self, response, most, until: response.read(),
        (f"{CLIENT}test_an_answer_that_cannot_be_is_refused_in_a_line",),
    ),
    Replacement(
        "a server's tokens are not counted",
        "drpo.rollout.vllm_request:_require_possible",
        lambda right: lambda *arguments: None,
        (f"{CLIENT}test_an_answer_that_cannot_be_is_refused_in_a_line",),
    ),
    Replacement(
        "a server that a folder names is asked",
        "drpo.cli.folder:at_server",
        lambda right: lambda run, folder, engine: run,
        (f"{STRANGERS}test_the_server_that_a_folder_names_is_not_asked",),
    ),
    Replacement(
        "a server's answer may drip for ever",
        "drpo.rollout.server:_Lines.ended_at",
        lambda right: lambda self, until, line: nullcontext(),
        (f"{CLIENT}test_an_answer_that_drips_ends_in_time",),
    ),
    Replacement(
        "the length of the right answer is sent along",
        "drpo.rewards.suites:longest",
        lambda right: lambda pair: len(pair.expected) + 4096,
        ("tests/test_code_tests.py::test_nothing_tells_a_program_how_long_the_right_answer_is",),
    ),
    Replacement(
        "what has another name is written to",
        "drpo.files:require_plain",
        _but_hard_links,
        (f"{FILES}test_what_grows_is_not_written_where_it_has_another_name",),
    ),
)
