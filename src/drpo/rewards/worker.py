"""What a reward's process does with items, and the items and their scores as they travel."""

import asyncio
import pickle
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from drpo.errors import describe
from drpo.rewards.contract import Reward, is_async
from drpo.rewards.scoring import Scored, call, call_all
from drpo.types import Failure, RewardResult


@dataclass(frozen=True)
class Scorer:
    """Scores items in a worker process; see `drpo.workers.serve.Handler`.

    Args:
        reward: scores them.
        seconds: limit of each call of an async reward; any other is limited from outside.
    """

    reward: Reward
    seconds: float
    keeps_processes: bool = False

    def handle(self, body: bytes) -> dict[str, Any]:
        """Return the records of the scores of a request's items, each a problem and an answer."""
        try:
            items = pickle.loads(body)
            if is_async(self.reward):
                scores = self._loop.run(call_all(self.reward, items, self.seconds))
            else:
                scores = [call(self.reward, problem, answer) for problem, answer in items]
        except BaseException as error:  # unreadable items, or a KeyboardInterrupt that the reward raised
            scores = [Scored(None, Failure("raised", describe(error)), 0.0)]
        return {"scores": [_record(scored) for scored in scores]}

    @cached_property
    def _loop(self) -> asyncio.Runner:
        """The process's event loop; connections that a reward keeps open belong to it."""
        return asyncio.Runner()


def _record(scored: Scored) -> dict[str, Any]:
    """`dataclasses.asdict`, which takes longer than a quick reward."""
    result, failure = scored.result, scored.failure
    return vars(scored) | {"result": result and vars(result), "failure": failure and vars(failure)}


def read_scores(record: dict[str, Any]) -> list[Scored]:
    """Return what a record of `Scorer` says.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    return [_read_scored(scored) for scored in record["scores"]]


def _read_scored(record: dict[str, Any]) -> Scored:
    failure, result = record["failure"], record["result"]
    if result is not None:
        result = RewardResult.of_floats(result["total"], result["parts"], result["turns"], result["weights"])
    usage = {str(name): n if isinstance(n, int) else float(n) for name, n in dict(record["usage"]).items()}
    return Scored(result, None if failure is None else Failure(**failure), float(record["seconds"]), usage)
