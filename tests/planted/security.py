"""Mistakes that let somebody in."""

from contextlib import contextmanager
from typing import Any

from planted import Replacement

FILES = "tests/test_files.py::"


@contextmanager
def _through(path: Any) -> Any:
    with path.open("wb") as file:
        yield file


@contextmanager
def _half(path: Any) -> Any:
    with open(f"{path}.writing", "wb") as file:
        yield file


REPLACEMENTS = (
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
        lambda right: lambda path, flags: __import__("os").open(path, flags, 0o666),
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
            f"{FILES}test_a_cell_that_is_a_link_is_not_written_to",
        ),
    ),
)
