"""Environments in worker processes under deadlines: one that raises, hangs, dies or lies costs its episode alone."""

import pickle
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from drpo.environments import worker
from drpo.environments.answers import MOST_CHARACTERS, Answer, of_record, same
from drpo.environments.config import EnvironmentConfig
from drpo.environments.contract import EnvironmentMaker
from drpo.environments.local import hidden_seed
from drpo.errors import InputError, describe
from drpo.rewards.contract import name_of
from drpo.types import Failure, Problem
from drpo.types.environment import Observation, StepResult, Turn
from drpo.workers.pool import ProcessPool, pickled
from drpo.workers.process import Service, WorkerProcess, preload

_Process: TypeAlias = WorkerProcess[Answer | Failure]
_AGAIN = "rebuilt after the death of its process"
_CLOSE_SECONDS = 2.0
_LONGEST_ANSWER = 32 * MOST_CHARACTERS  # messages and calls, up to 12 bytes a character in JSON, and the rest


class EnvironmentPool:
    """Holds the environments of many episodes in worker processes; use it in a `with` statement.

    Episode n belongs to process n modulo `config.processes`. When that process is killed, its other episodes are
    rebuilt in its successor as they are needed: opened with the same seed and given the same turns. So environments
    must answer the same turns the same way; an episode that is rebuilt and answers otherwise fails.

    Args:
        maker: opens the environments. Child processes import it by its module and name.
        seed: of the hidden states.
        config: processes and limits; None is `EnvironmentConfig()`.

    Raises:
        InputError: a maker that child processes cannot import.

    Example:
        >>> from drpo.environments.games import Guess
        >>> with EnvironmentPool(Guess()) as environments:
        ...     first = environments.open(Guess().held_out(2))
        ...     environments.step({1: Turn("2", (), "stop")})
        {1: StepResult(messages=(), reward=1.0, done=True, calls=(), failed_calls=0)}
    """

    def __init__(self, maker: EnvironmentMaker, seed: int = 0, config: EnvironmentConfig | None = None) -> None:
        self.config = config or EnvironmentConfig()
        self._maker, self._seed = maker, seed
        self._pool = _pool(maker, self.config)
        self._episodes: list[_Episode] = []

    def __enter__(self) -> "EnvironmentPool":
        """Start the processes and wait until one has imported the maker."""
        self._pool.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Close every episode and kill the processes."""
        self.close()
        self._pool.end()

    @property
    def max_turns(self) -> int:
        """The maker's."""
        return self._maker.max_turns

    def open(self, problems: Sequence[Problem]) -> list[Observation | Failure]:
        """Open an episode for each problem, numbered from 0; the hidden state is a function of seed and problem's id.

        Raises:
            InputError: a problem that cannot be sent to a process, or a process that cannot be started again.
        """
        self.close()
        self._episodes = [_Episode(n, _opening(n, p, hidden_seed(self._seed, p))) for n, p in enumerate(problems)]
        return self._answers(self._episodes)

    def step(self, turns: Mapping[int, Turn]) -> dict[int, StepResult | Failure]:
        """Return what each episode's environment answers to its turn.

        Raises:
            InputError: a process died and could not be started again.
        """
        episodes = [self._episodes[number] for number in turns]
        for episode in episodes:
            episode.calls.append(pickle.dumps(("step", episode.number, turns[episode.number])))
        return dict(zip(turns, self._answers(episodes), strict=True))

    def close(self) -> None:
        """Close every episode that a process holds; a process in which that takes too long is killed."""
        held = [_Closing(e.number, e.process) for e in self._episodes if e.process in self._pool.workers]
        self._episodes = []
        if held:
            self._make_calls(held, min(self.config.seconds, _CLOSE_SECONDS))

    def _answers(self, episodes: Sequence["_Episode"]) -> list[Any]:
        """Return what each episode's last call returned, or why the episode failed."""
        self._make_calls(episodes, self.config.seconds)
        return [e.failure or e.answers[-1] for e in episodes]

    def _make_calls(self, episodes: Sequence["_Episode | _Closing"], seconds: float) -> None:
        """Have each process make the calls of its episodes, one episode after the other."""
        n = self.config.processes
        queues = [deque(e for e in episodes if e.number % n == number) for number in range(n)]
        with self._pool.requests():
            while True:
                for queue, process in zip(queues, self._pool.workers, strict=True):
                    while queue and not queue[0].waits(process):
                        queue.popleft()
                    if queue and process.free:
                        process.give(queue[0].number, queue[0].next_call(process), seconds)
                if not any(queues):
                    return
                for event in self._pool.attend():
                    queues[event.worker][0].hear(event.answer)


class _Episode:
    """The calls of an episode and what they returned, so that it can be rebuilt in another process.

    Args:
        number: of the episode.
        opening: the request that opens it; `calls` has those of its turns behind it.
    """

    def __init__(self, number: int, opening: bytes) -> None:
        self.number = number
        self.calls = [opening]
        self.answers: list[Answer] = []
        self.failure: Failure | None = None
        self.process: _Process | None = None  # that holds it
        self._made = 0  # calls, in that process

    def waits(self, process: _Process) -> bool:
        """Whether a call has no answer yet."""
        return self.failure is None and len(self.answers) < len(self.calls)

    def next_call(self, process: _Process) -> bytes:
        """Return the request that comes next in a process: the first where the process does not hold the episode."""
        if process is not self.process:
            self.process, self._made = process, 0
        return self.calls[self._made]

    def hear(self, answer: Answer | Failure) -> None:
        """Take the answer to the last request."""
        call, self._made = self._made, self._made + 1
        again = call < len(self.answers)
        if isinstance(answer, Failure):
            self.failure = Failure(answer.kind, f"{_AGAIN}: {answer.text}") if again else answer
        elif again and not same(answer, self.answers[call]):
            which = f"turn {call - 1} was" if call else "the first messages were"
            self.failure = Failure("died", f"{_AGAIN}, and {which} not answered as before: must be deterministic")
        elif not isinstance(answer, StepResult if call else Observation):
            self.failure = Failure("died", "the environment process sent an invalid answer")
        elif not again:
            self.answers.append(answer)


class _Closing:
    """The end of an episode that a process holds."""

    def __init__(self, number: int, process: _Process | None) -> None:
        self.number, self._process = number, process

    def waits(self, process: _Process) -> bool:
        """Whether the process still holds it."""
        return process is self._process

    def next_call(self, process: _Process) -> bytes:
        """Return the request to close it."""
        return pickle.dumps(("close", self.number))

    def hear(self, answer: Answer | Failure) -> None:
        """It is closed, whatever that returned."""
        self._process = None


def _opening(number: int, problem: Problem, seed: int) -> bytes:
    try:
        return pickle.dumps(("open", number, problem, seed))
    except Exception as error:
        raise InputError(
            f"problem {problem.id!r} cannot be sent to the environment's process: {describe(error)}"
        ) from None


def _pool(maker: EnvironmentMaker, config: EnvironmentConfig) -> ProcessPool[Answer | Failure]:
    name = name_of(maker)
    handler = pickled("environment", name, worker.EpisodeHandler(maker))
    # Whatever of this room the maker imports, such as the schemas of tools, takes seconds to import.
    preload([m for m in sys.modules if m.startswith("drpo.environments.")], getattr(maker, "__module__", None) or "")
    service = Service("environment", handler, of_record, _LONGEST_ANSWER, config.memory_gb)
    return ProcessPool(service, name, config.processes)
