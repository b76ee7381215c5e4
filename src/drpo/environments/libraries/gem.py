"""The environments of GEM (`pip install --no-deps gem-llm`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from drpo.environments.libraries.imports import library, suggestion
from drpo.environments.libraries.seeded import Answer, Game, SeededTask
from drpo.errors import InputError


@dataclass(frozen=True)
class Gem(SeededTask):
    """An environment of GEM by its id: `gem('game:GuessTheNumber-v0-easy')`.

    Those that start with "game:" need no data; others read a data set from the hub when they are made.

    Args:
        name: its id.
        turns: at most, 1 to 1024; the environment's own limit may be below.
        system: the system message, or None.
        arguments: of the environment: {"max_number": 5}.

    Raises:
        InputError: GEM is not installed, an unknown id, a value out of its range, an environment that does not start.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        known = self._registered()
        if self.name not in known:
            raise InputError(
                f"gem: unknown environment {self.name!r}{suggestion(self.name, known, 'gem.print_envs()')}"
            )
        self.require()

    @property
    def hidden_state(self) -> bool:  # type: ignore[override]
        """Games differ in more than what the model reads first; questions of a data set do not."""
        return self.name.startswith("game:")

    def game(self) -> Game:
        """Return a new environment, not yet started."""
        return _GemGame(library("gem", self.who, "--no-deps gem-llm").make(self.name, **self.arguments))

    def _registered(self) -> Mapping[str, Any]:
        library("gem.envs", self.who, "--no-deps gem-llm")
        registry: Mapping[str, Any] = library("gem.envs.registration", self.who, "--no-deps gem-llm").ENV_REGISTRY
        return registry


class _GemGame:
    def __init__(self, environment: Any) -> None:
        self._environment = environment

    def reset(self, seed: int) -> str:
        text, info = self._environment.reset(seed=seed)
        return _with_suffix(text, info)

    def step(self, action: str) -> Answer:
        text, reward, terminated, truncated, info = self._environment.step(action)
        return Answer(_with_suffix(text, info), float(reward), bool(terminated or truncated))

    def close(self) -> None:
        pass


def _with_suffix(text: str, info: Mapping[str, Any]) -> str:
    """What a player of GEM reads: the observation, and what it is asked for on a line of its own."""
    suffix = info.get("suffix") or ""
    return f"{text.rstrip()}\n{suffix}" if suffix else text
