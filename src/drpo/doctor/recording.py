"""An engine that keeps what it was asked and what it sampled, to be compared with what is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from drpo.rollout import Engine
from drpo.types import Episode, Generation, Key, Request


@dataclass(frozen=True, eq=False)
class Sampled:
    """A turn as the engine sampled it.

    Args:
        request: what it read.
        generation: what it sampled.
    """

    request: Request
    generation: Generation


class RecordingEngine:
    """Samples with another engine.

    Args:
        engine: it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sampled: dict[Key, Sampled] = {}

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return what the engine samples."""
        generations = self._engine.generate(requests)
        self._sampled.update({r.key: Sampled(r, g) for r, g in zip(requests, generations, strict=True)})
        return generations

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Load new weights into the engine."""
        self._engine.load_weights(state, version)

    def release(self) -> None:
        """Let the engine free what it keeps between turns."""
        self._engine.release()

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def turns_of(self, key: Key, episode: Episode) -> list[Sampled]:
        """Return an episode's turns, in order.

        Args:
            key: that the episode driver was given.
            episode: that it returned.
        """
        first = (*key, episode.problem_id, episode.sample)
        return [self._sampled[(*first, turn) if turn else first] for turn in range(len(episode.turns))]
