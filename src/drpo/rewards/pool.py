"""Runs rewards in child processes under deadlines, so no completion can hang or crash the run or give it a NaN."""

import pickle
from collections import deque
from collections.abc import Sequence
from threading import Lock

from drpo.errors import InputError, describe
from drpo.rewards import worker
from drpo.rewards.contract import Reward, name_of, reads_transcript
from drpo.rewards.scoring import RewardConfig, Scored, call
from drpo.types import Failure, Problem, Transcript
from drpo.workers.pool import ProcessPool, pickled
from drpo.workers.process import Service, preload

_LONGEST_ANSWER = 1 << 16


class RewardPool:
    """Scores completions with a reward, each under a deadline; use it in a `with` statement.

    The reward runs in child processes. If it hangs, crashes, forks or calls `os._exit`, only its own score is lost. A
    reward marked `in_process` is called in this process instead. Child processes import the reward by its module and
    name, and they import the main script too: a script that uses a pool needs `if __name__ == "__main__":`.

    Args:
        reward: called as `reward(problem, transcript)` or `reward(problem, text)` (see `reads_transcript`). It returns
            a finite number, a `RewardResult`, or None to abstain.
        config: processes, limits, and the handling of failures; None is `RewardConfig()`.

    Raises:
        InputError: a reward that child processes cannot import.

    Example:
        >>> from drpo.rewards import exact_number
        >>> with RewardPool(exact_number) as pool:
        ...     [scored.score for scored in pool.score([(Problem.of_text("0", "1 + 1?", "2"), "It is 2.")])]
        [1.0]
    """

    def __init__(self, reward: Reward, config: RewardConfig | None = None) -> None:
        self.config = config or RewardConfig()
        self._reward = reward
        self._reads_transcript = reads_transcript(reward)
        self._one_at_a_time = Lock()  # the thread that samples ahead scores too, where it samples groups again
        self._pool = None if getattr(reward, "in_process", False) else _pool(reward, self.config)

    def __enter__(self) -> "RewardPool":
        """Start the processes and wait until one has imported the reward."""
        if self._pool is not None:
            self._pool.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the processes."""
        if self._pool is not None:
            self._pool.end()

    def score(self, items: Sequence[tuple[Problem, str | Transcript]]) -> list[Scored]:
        """Score completions.

        Args:
            items: problems, each with a transcript or with a text that no model sampled.

        Returns:
            One `Scored` per item, in order. It has a `failure` if the reward raised, timed out, died or returned
            anything but a finite number, a `RewardResult` or None.

        Raises:
            InputError: a process died and could not be started again.
        """
        with self._one_at_a_time:
            return self._scores(items)

    def _scores(self, items: Sequence[tuple[Problem, str | Transcript]]) -> list[Scored]:
        if self._pool is None:
            return [call(self._reward, problem, self._read(problem, answer)) for problem, answer in items]
        waiting = deque((place, _pack(p, self._read(p, answer))) for place, (p, answer) in enumerate(items))
        scores: dict[int, Scored] = {}
        with self._pool.requests():
            while len(scores) < len(items):
                for process in self._pool.workers:
                    if waiting and process.free:
                        process.give(*waiting.popleft(), self.config.seconds)
                scores |= {event.place: self._scored(event.answer) for event in self._pool.attend()}
        return [scores[place] for place in range(len(items))]

    def _scored(self, answer: Scored | Failure) -> Scored:
        if isinstance(answer, Scored):
            return answer
        return Scored(None, answer, self.config.seconds if answer.kind == "timed_out" else 0.0)

    def _read(self, problem: Problem, answer: str | Transcript) -> str | Transcript:
        """Return the text or the transcript, as the reward expects; nothing else is sent to its process."""
        if not self._reads_transcript:
            return answer.text if isinstance(answer, Transcript) else answer
        return answer if isinstance(answer, Transcript) else Transcript.of_text(problem, answer)


def _pool(reward: Reward, config: RewardConfig) -> ProcessPool[Scored]:
    name, module = name_of(reward), getattr(reward, "__module__", None) or ""
    handler = pickled("reward", name, worker.Scorer(reward))
    preload([worker.__name__, *([module] if module.startswith("drpo.") else [])])
    service = Service("reward", handler, worker.read_scored, _LONGEST_ANSWER, config.memory_gb)
    return ProcessPool(service, name, config.processes)


def _pack(problem: Problem, answer: str | Transcript) -> bytes:
    try:
        return pickle.dumps((problem, answer))
    except Exception as error:
        raise InputError(f"problem {problem.id!r} cannot be sent to the reward's process: {describe(error)}") from None
