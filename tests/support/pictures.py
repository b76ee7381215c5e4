"""Trainings without what is drawn at their end."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def without_pictures() -> Iterator[None]:
    """`drpo train` writes no report: that of a smoke run takes longer than all the rest of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drpo.cli.train.write_report", lambda folder, run: None)
        yield
