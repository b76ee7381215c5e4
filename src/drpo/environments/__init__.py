"""Environments: what answers a model's turns. `REGISTRY` has those that go with the problems of any task."""

from drpo.environments.config import EnvironmentConfig
from drpo.environments.contract import Environment, EnvironmentMaker, EnvironmentTask
from drpo.environments.local import LocalEnvironments
from drpo.environments.pool import EnvironmentPool
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
        InputError: a maker that worker processes cannot import.
    """
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
