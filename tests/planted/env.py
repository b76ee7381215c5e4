"""Mistakes in `drpo env`."""

from planted import Bug

T = "tests/test_env.py::"

BUGS = (
    Bug(
        20,
        "drpo env prints secrets",
        "cli/env.py",
        'return {n: v if n in SHOWN else "(set)" for n, v',
        "return {n: v for n, v",
        (f"{T}test_no_secret_is_printed",),
    ),
    Bug(
        20,
        "drpo env hides what is no secret",
        "cli/env.py",
        'return {n: v if n in SHOWN else "(set)" for n, v',
        'return {n: "(set)" for n, v',
        (f"{T}test_no_secret_is_printed",),
    ),
)
