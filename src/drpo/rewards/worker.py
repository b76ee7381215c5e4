"""What a reward's process does with an item, and the item and its score as they travel."""

import pickle
from dataclasses import asdict, dataclass
from typing import Any

from drpo.errors import describe
from drpo.rewards.contract import Reward
from drpo.rewards.scoring import Scored, call
from drpo.types import Failure, RewardResult


@dataclass(frozen=True)
class Scorer:
    """Scores items in a worker process; see `drpo.workers.serve.Handler`.

    Args:
        reward: scores them.
    """

    reward: Reward
    keeps_processes: bool = False

    def handle(self, body: bytes) -> dict[str, Any]:
        """Return the record of an item's score."""
        try:
            problem, answer = pickle.loads(body)
            return asdict(call(self.reward, problem, answer))
        except BaseException as error:  # an unreadable item, or a KeyboardInterrupt that the reward raised
            return asdict(Scored(None, Failure("raised", describe(error)), 0.0))


def read_scored(record: dict[str, Any]) -> Scored:
    """Return what a record of `Scorer` says.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    failure, result = record["failure"], record["result"]
    if result is not None:
        result = RewardResult.of_floats(result["total"], result["parts"], result["turns"])
    return Scored(result, None if failure is None else Failure(**failure), float(record["seconds"]))
