"""Runs rewards in child processes under deadlines, so no completion can hang or crash the run or give it a NaN."""

import asyncio
import math
import pickle
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Lock
from typing import TypeAlias
from zlib import crc32

from drpo.errors import InputError, counted, describe
from drpo.rewards import worker
from drpo.rewards.contract import Reward, concurrency, is_async, name_of, reads_transcript
from drpo.rewards.scoring import Item, RewardConfig, Scored, call, call_all, call_batch
from drpo.rewards.weighted import WeightedSum, part_name
from drpo.types import Failure, Problem, Transcript
from drpo.workers.pool import ProcessPool, pickled
from drpo.workers.process import Service, preload

Places: TypeAlias = tuple[int, ...]
"""Of the items of one request, among all."""
_LONGEST_ANSWER = 1 << 16
_MOST_AT_ONCE = 256
"""Items of one request to a process whose reward is async."""
_MOST_QUICK, _MOST_BYTES, _QUICK_SECONDS = 256, 1 << 16, 1e-3
"""Calls that a process is sent at once, the bytes from which on no further one, and the time of a quick call."""
_GRACE_SECONDS = 2.0
"""After the limits of its calls, until a process that awaits them is taken for hung."""


class RewardPool:
    """Scores completions with a reward, each under a deadline; use it in a `with` statement.

    The reward runs in child processes. If it hangs, crashes, forks or calls `os._exit`, only its own score is lost. A
    reward marked `in_process` is called in this process instead. Child processes import the reward by its module and
    name, and they import the main script too: a script that uses a pool needs `if __name__ == "__main__":`.

    Calls of less than a millisecond are sent to a process by the dozen, which makes one after the other; each has
    its own deadline. If the process is lost in one of them, those after it are made in another.

    A process awaits many calls of an async reward at once. Where that process dies or hangs, each of its calls is tried
    again alone.

    A reward with the attribute `tried_on` is first called for that many items. Where every one of these calls fails,
    the pool raises: an endpoint that never answers is not asked for all the others too.

    Each reward of a sum (`WeightedSum`) has a pool of its own, with the same limits.

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
        self._untried = int(getattr(reward, "tried_on", 0))
        self._one_at_a_time = Lock()  # the thread that samples ahead scores too, where it samples groups again
        self._seconds = max(self.config.seconds, float(getattr(reward, "longest_seconds", 0.0)))
        self._parts = [RewardPool(r, self.config) for r in reward.rewards] if isinstance(reward, WeightedSum) else []
        here = self._parts or getattr(reward, "in_process", False)
        self._pool = None if here else _pool(reward, self.config, self._seconds)

    def __enter__(self) -> "RewardPool":
        """Start the processes and wait until one has imported the reward.

        Raises:
            InputError: it cannot be imported, or cannot start.
        """
        start = getattr(self._reward, "start", None)
        if callable(start):
            start()
        if self._pool is not None:
            self._pool.start()
        with ExitStack() as started:
            for part in self._parts:
                started.enter_context(part)
            started.pop_all()  # all have, so they go on
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the processes."""
        if self._pool is not None:
            self._pool.end()
        for part in self._parts:
            part.__exit__()

    def score(self, items: Sequence[tuple[Problem, str | Transcript]]) -> list[Scored]:
        """Score completions.

        Args:
            items: problems, each with a transcript or with a text that no model sampled.

        Returns:
            One `Scored` per item, in order. It has a `failure` if the reward raised, timed out, died or returned
            anything but a finite number, a `RewardResult` or None.

        Raises:
            InputError: a process died and could not be started again, or the reward failed each time that it was tried.
        """
        with self._one_at_a_time:
            first = self._scores(items[: self._untried])
            if self._untried and len(first) == self._untried:
                _require_one(self._reward, first)
                self._untried = 0
            return first + self._scores(items[len(first) :])

    def _scores(self, items: Sequence[tuple[Problem, str | Transcript]]) -> list[Scored]:
        if isinstance(self._reward, WeightedSum):
            of_parts = [part.score(items) for part in self._parts]
            return [self._reward.combined(of_one) for of_one in zip(*of_parts, strict=True)]
        read = [(problem, self._read(problem, answer)) for problem, answer in items]
        if self._pool is None:
            return self._here(read)
        scores: dict[int, Scored] = {}
        jobs, at_once = deque(self._jobs(read)), 1
        in_work: dict[int, Places] = {}
        most = 1 if is_async(self._reward) else _MOST_QUICK
        with self._pool.requests():
            while len(scores) < len(items):
                for process in self._pool.workers:
                    if jobs and process.free:
                        given = self._next(jobs, read, at_once)
                        in_work |= {places[0]: places for places, _ in given}
                        process.give_all([(places[0], body) for places, body in given], self._limit(given[0][0]))
                for event in self._pool.attend():
                    places = in_work.pop(event.place)
                    jobs.extendleft(in_work.pop(place) for place in reversed(event.unbegun))
                    if len(places) > 1 and not _answers(event.answer, places):
                        jobs.extend((place,) for place in places)  # one of them took the process from all
                        continue
                    found = self._scored(event.answer)
                    scores |= zip(places, found, strict=True)
                    quick = not isinstance(event.answer, Failure) and found[0].seconds < _QUICK_SECONDS
                    at_once = min(at_once + 1, most) if quick else 1
        return [scores[place] for place in range(len(items))]

    def _next(self, jobs: deque[Places], items: Sequence[Item], at_once: int) -> list[tuple[Places, bytes]]:
        """Take the next jobs of one process, at most half its share of what is left; return them with their bodies."""
        most, n_bytes = min(at_once, -(-len(jobs) // (2 * self.config.processes))), 0
        given: list[tuple[Places, bytes]] = []
        while len(given) < most and n_bytes < _MOST_BYTES:
            places = jobs.popleft()
            given.append((places, _pack([items[i] for i in places])))
            n_bytes += len(given[-1][1])
        return given

    def _here(self, items: Sequence[Item]) -> list[Scored]:
        """Score in this process."""
        if hasattr(self._reward, "score_all"):
            return call_batch(self._reward, items)
        if not is_async(self._reward):
            return [call(self._reward, problem, answer) for problem, answer in items]
        with ThreadPoolExecutor(1) as apart:  # this thread may have an event loop: a notebook's has
            return apart.submit(asyncio.run, call_all(self._reward, items, self._seconds)).result()

    def _jobs(self, items: Sequence[Item]) -> list[Places]:
        """Return the places of the items of each request: one, or of an async reward many.

        A text always goes to the same process, which may know its score.
        """
        if not is_async(self._reward):
            return [(place,) for place in range(len(items))]
        shares: list[list[int]] = [[] for _ in range(self.config.processes)]
        for place, (_, answer) in enumerate(items):
            text = answer.text if isinstance(answer, Transcript) else answer
            shares[crc32(text.encode("utf-8", "replace")) % len(shares)].append(place)
        return [tuple(s[i : i + _MOST_AT_ONCE]) for s in shares for i in range(0, len(s), _MOST_AT_ONCE)]

    def _limit(self, places: Places) -> float:
        """Return the deadline of a request."""
        if not is_async(self._reward):
            return self._seconds
        return self._seconds * math.ceil(len(places) / concurrency(self._reward)) + _GRACE_SECONDS

    def _scored(self, answer: list[Scored] | Failure) -> list[Scored]:
        if not isinstance(answer, Failure):
            return answer
        return [Scored(None, answer, self._seconds if answer.kind == "timed_out" else 0.0)]

    def _read(self, problem: Problem, answer: str | Transcript) -> str | Transcript:
        """Return the text or the transcript, as the reward expects; nothing else is sent to its process."""
        if not self._reads_transcript:
            return answer.text if isinstance(answer, Transcript) else answer
        return answer if isinstance(answer, Transcript) else Transcript.of_text(problem, answer)


def _require_one(reward: Reward, scores: Sequence[Scored]) -> None:
    """Raise where every call failed."""
    failures = [scored.failure for scored in scores if scored.failure is not None]
    if len(failures) == len(scores):
        asked = counted(len(scores), "score")
        raise InputError(f"{part_name(reward)}: {asked} asked for, none given: {failures[0].text}")


def _answers(answer: list[Scored] | Failure, places: Places) -> bool:
    return not isinstance(answer, Failure) and len(answer) == len(places)


def _pool(reward: Reward, config: RewardConfig, seconds: float) -> ProcessPool[list[Scored]]:
    name, module = name_of(reward), getattr(reward, "__module__", None) or ""
    handler = pickled("reward", name, worker.Scorer(reward, seconds))
    preload([worker.__name__], module)
    longest = _LONGEST_ANSWER * (_MOST_AT_ONCE if is_async(reward) else 1)
    return ProcessPool(
        Service("reward", handler, worker.read_scores, longest, config.memory_gb), name, config.processes
    )


def _pack(items: Sequence[Item]) -> bytes:
    try:
        return pickle.dumps(items)
    except Exception as error:
        for problem, answer in items if len(items) > 1 else ():
            _pack([(problem, answer)])
        raise InputError(
            f"problem {items[0][0].id!r} cannot be sent to the reward's process: {describe(error)}"
        ) from None
