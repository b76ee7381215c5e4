"""Environments: what answers a model's turns. `REGISTRY` has those that go with the problems of any task."""

from drpo.environments.contract import EnvironmentMaker
from drpo.spec import Registry

REGISTRY: Registry[EnvironmentMaker] = Registry("environment", {"tools": "drpo.environments.tools:Tools"})

__all__ = ["REGISTRY", "EnvironmentMaker"]
