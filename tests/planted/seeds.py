"""Mistakes in the seeds of random numbers."""

from planted import Replacement

REPLACEMENTS = (
    Replacement(
        "every seed is 7",
        "drpo.seeds:derive",
        lambda right: lambda *parts: 7,
        ("tests/test_engines.py::test_every_part_of_a_key_matters",),
    ),
)
