"""Trainings without what is drawn at their end."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def without_pictures() -> Iterator[None]:
    """`drpo train` draws neither curves nor report: those of a smoke run take longer than all the rest of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_run", "write_report"):
            patch.setattr(f"drpo.cli.train.{name}", lambda folder, run: None)
        yield
