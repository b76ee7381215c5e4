"""Commands without what they draw."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def without_pictures() -> Iterator[None]:
    """`drpo train` writes no report, which takes longer than a smoke run itself, and `drpo weights --out` no file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drpo.cli.weights.draw_png", lambda objectives, mus, path: None)
        patch.setattr("drpo.cli.train.write_report", lambda folder, run: None)
        yield
