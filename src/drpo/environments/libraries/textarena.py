"""The games for one player of TextArena (`pip install textarena`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from drpo.environments.libraries.imports import library, suggestion
from drpo.environments.libraries.seeded import Answer, Game, SeededTask
from drpo.errors import InputError


@dataclass(frozen=True)
class TextArena(SeededTask):
    """A game of TextArena for one player: `textarena('GuessTheNumber-v0')`.

    The player reads what is new since the last turn, not the history again that TextArena's wrappers repeat, since the
    conversation has it. The reward is the game's, at its end.

    Args:
        name: the game's id.
        turns: at most, 1 to 1024; the game's own limit may be below.
        system: the system message, or None.
        arguments: of the game: {"max_number": 5}.

    Raises:
        InputError: TextArena is not installed, an unknown game, a value out of its range, a game that does not start:
            it is for more players, or needs a file that the package does not have.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        known = library("textarena.envs.registration", self.who, "textarena").ENV_REGISTRY
        if self.name not in known:
            listing = "textarena.pprint_registry_detailed()"
            raise InputError(f"textarena: unknown game {self.name!r}{suggestion(self.name, known, listing)}")
        self.require()

    def game(self) -> Game:
        """Return a new game, not yet started."""
        return _ArenaGame(library("textarena", self.who, "textarena").make(self.name, **self.arguments))


class _ArenaGame:
    def __init__(self, environment: Any) -> None:
        self._environment = environment

    def reset(self, seed: int) -> str:
        self._environment.reset(num_players=1, seed=seed)
        return self._news()

    def step(self, action: str) -> Answer:
        errors = self._errors()
        done, _ = self._environment.step(action)
        failed = self._errors() > errors
        if not done:
            return Answer(self._news(), 0.0, False, failed)
        rewards, told = self._environment.close()
        return Answer("", float((rewards or {}).get(0, 0.0)), True, bool(told[0].get("invalid_move")) or failed)

    def close(self) -> None:
        pass

    def _errors(self) -> int:
        return int(getattr(self._environment.state, "error_count", 0))

    def _news(self) -> str:
        """What was said since the last turn, without the player's own words."""
        said = self._environment.state.get_current_player_observation()
        return "\n".join(text for who, text, _ in said if who != 0) or "Go on."
