"""Environments: what answers a model's turns. `REGISTRY` has those that go with the problems of any task."""

from drpo.environments.config import EnvironmentConfig
from drpo.environments.contract import Environment, EnvironmentMaker, EnvironmentTask
from drpo.environments.local import LocalEnvironments
from drpo.environments.pool import EnvironmentPool
from drpo.errors import InputError
from drpo.rewards.contract import name_of
from drpo.spec import Registry

REGISTRY: Registry[EnvironmentMaker] = Registry("environment", {"tools": "drpo.environments.tools:Tools"})


def make(
    maker: EnvironmentMaker, seed: int = 0, config: EnvironmentConfig | None = None
) -> LocalEnvironments | EnvironmentPool:
    """Return the holder of a run's environments, to be used in a `with` statement.

    Args:
        maker: opens them. Declared with `drpo.rewards.in_process` they run in this process, else in worker processes.
        seed: of the hidden states.
        config: of the worker processes; None is `EnvironmentConfig()`.

    Raises:
        InputError: a maker without a number of turns, or one that worker processes cannot import.
    """
    turns = getattr(maker, "max_turns", None)
    if type(turns) is not int or turns < 1:
        raise InputError(f"{name_of(maker)}: max_turns={turns!r} must be a whole number of at least 1")
    if getattr(maker, "in_process", False):
        return LocalEnvironments(maker, seed)
    return EnvironmentPool(maker, seed, config)


__all__ = [
    "REGISTRY",
    "Environment",
    "EnvironmentConfig",
    "EnvironmentMaker",
    "EnvironmentPool",
    "EnvironmentTask",
    "LocalEnvironments",
    "make",
]
