"""Settings that every test shares: a test draws the same random numbers wherever and after whatever it runs."""

import gc
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from drpo.workers.process import preload
from support.pictures import without_pictures

settings.register_profile(
    "default",
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# For tests/plant_bugs.py, which asks only whether a test fails.
settings.register_profile("no_shrinking", settings.get_profile("default"), phases=[Phase.explicit, Phase.generate])
# For `make test-slow`: other cases each time. Pin what it finds with @example.
settings.register_profile(
    "random", settings.get_profile("default"), max_examples=300, derandomize=False, print_blob=True
)
settings.load_profile("default")


def _draw_from_nothing_else() -> None:
    """Derandomised, hypothesis draws from a test's source, and also from the constants of all modules loaded so far.

    The latter would make a test's cases depend on what ran before it, on every edit of the package, and on the folder.
    """
    providers = sys.modules.get("hypothesis.internal.conjecture.providers")
    collect = getattr(providers, "_get_local_constants", None)  # not public; other versions may have no such thing
    if collect is not None:
        none = providers._local_constants  # nothing is collected yet
        providers._get_local_constants = lambda: none if settings.default.derandomize else collect()


_draw_from_nothing_else()


def pytest_sessionstart() -> None:
    """The first pool of a session settles what all forked workers have imported, and may need less than the others."""
    preload(["drpo.rewards.worker", "drpo.environments.worker"], "tests")


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the garbage collector need not look through it again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw from a global generator draw the same in any order and process."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)  # torch.manual_seed formats a stack for each device that is not there


@pytest.fixture(name="without_pictures")
def _without_pictures() -> Iterator[None]:
    """For a test that trains by the command and is about something else."""
    with without_pictures():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for PyTorch, as in a process that `support.forks` begins: equal to the bit, and free to fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
