"""What an environment's process does with a request."""

import pickle
from typing import Any

from drpo.environments.answers import to_record
from drpo.environments.contract import EnvironmentMaker
from drpo.environments.host import EpisodeHost
from drpo.errors import describe
from drpo.types import Failure
from drpo.types.environment import StepResult


class EpisodeHandler:
    """Opens, steps and closes episodes in a worker process; see `drpo.workers.serve.Handler`.

    Args:
        maker: opens the environments.
    """

    def __init__(self, maker: EnvironmentMaker) -> None:
        self._host = EpisodeHost(maker)

    @property
    def keeps_processes(self) -> bool:
        """What episodes start may go on until all are closed."""
        return bool(self._host.episodes)

    def handle(self, body: bytes) -> dict[str, Any]:
        """Call the host's method that a request names, and return the record of the answer."""
        try:
            method, *arguments = pickle.loads(body)
            return to_record(getattr(self._host, method)(*arguments) or StepResult(done=True))
        except BaseException as error:  # an unreadable request, or a KeyboardInterrupt that the environment raised
            return to_record(Failure("raised", describe(error)))
