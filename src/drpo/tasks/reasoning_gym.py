"""Procedural tasks of the library reasoning-gym."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count, islice
from typing import Any

from drpo.errors import InputError
from drpo.rewards import Reward
from drpo.rewards.gym import GymScore, make_dataset
from drpo.seeds import derive
from drpo.types import Problem

Entry = Mapping[str, Any]

SYSTEM = """\
Given a problem, your task is to answer the question by thinking step-by-step in a clear and specific manner.
Once you have thought about the reasoning process, provide the answer in the following format:
<answer>answer here</answer>
Do not explain your reasoning inside the answer tags, provide only the final answer. When an example is provided, you \
should strictly follow the format of the output/answer in that example.
"""
"""The library's system prompt, copied because importing the library takes a second."""

_HELD_OUT_SHARE = 4  # one question in 4 is held out
_CHUNK = 64  # items per dataset; some build all items at once, so a stream is many small datasets
_TRIES = 256  # useless draws in a row before giving up; by chance at most 0.75**256


@dataclass(frozen=True)
class ReasoningGym:
    """Any dataset of reasoning-gym, scored by its own scorer.

    A hash of its text assigns each question to the held-out set (one in four) or to training, so the two never share a
    question. Both are endless streams with different seeds. The questions of a few datasets, which iterate over sets,
    also depend on PYTHONHASHSEED.

    Args:
        name: its name in reasoning-gym: "countdown".
        arguments: fields of the dataset's config, except `seed` and `size`.
        seed: of the streams; training problems also depend on the run's seed.
        system: the system message, or None. The default is reasoning-gym's: it asks for the answer between <answer> and
            </answer>, which the scorer reads.

    Raises:
        InputError: an unknown dataset or argument, or a value that the dataset rejects.

    Example:
        >>> task = ReasoningGym("basic_arithmetic", {"min_terms": 2, "max_terms": 2})
        >>> problem = task.sample(1, step=0, seed=0)[0]
        >>> task.reward(problem, f"<answer>{problem.answer}</answer>")
        1.0
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    seed: int = 0
    system: str | None = SYSTEM

    def __post_init__(self) -> None:
        make_dataset(self.name, self.arguments, seed=0, size=1)  # raises before the run begins

    @cached_property
    def reward(self) -> Reward:
        """The dataset's scorer; reads the text between the answer tags, or the whole text without tags."""
        return GymScore(self.name, self.arguments)

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw from the stream of (seed, step), leaving out held-out questions; see `Task.sample`."""
        entries = list(islice(_training(self, seed, step), n))
        if len(entries) < n:
            raise InputError(f"{self.who}: {_TRIES} questions in a row are all held out; it has too few")
        return [self._problem(f"{step}-{slot}", entry) for slot, entry in enumerate(entries)]

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n distinct held-out questions, or fewer if no more turn up; see `Task.held_out`."""
        entries = _held_out(self, n)
        if n and not entries:
            raise InputError(f"{self.who}: none of {_TRIES} questions in a row is held out; it has too few")
        return [self._problem(f"held-out-{i}", entry) for i, entry in enumerate(entries)]

    @property
    def who(self) -> str:
        """The task's name in error messages."""
        return f"reasoning-gym dataset {self.name!r} with {dict(self.arguments)}"

    def _problem(self, name: str, entry: Entry) -> Problem:
        answer = entry["answer"]  # None if there is no single right answer
        return Problem.of_text(name, entry["question"], "" if answer is None else str(answer), self.system, entry)


def _training(task: ReasoningGym, seed: int, step: int) -> Iterator[Entry]:
    useless = 0
    for entry in _stream(task, "train", seed, step):
        useless = useless + 1 if _is_held_out(entry) else 0
        if useless == _TRIES:
            return
        if not useless:
            yield entry


@lru_cache(maxsize=8)  # evaluations repeat; some questions take 0.25 s to build
def _held_out(task: ReasoningGym, n: int) -> list[Entry]:
    entries: dict[str, Entry] = {}
    useless = 0
    for entry in _stream(task, "held out"):
        if len(entries) == n or useless == _TRIES:
            break
        useless += 1
        if _is_held_out(entry) and entry["question"] not in entries:
            entries[entry["question"]] = entry
            useless = 0
    return list(entries.values())


def _stream(task: ReasoningGym, *name: int | str) -> Iterator[Entry]:
    failures = 0
    for chunk in count():
        seed = derive("reasoning-gym", task.seed, *name, chunk) % 2**31
        dataset = make_dataset(task.name, task.arguments, seed, _CHUNK)
        for i in range(_CHUNK):
            try:
                entry = dataset[i]
            except Exception as error:  # some seeds fail, one in a hundred of countdown's
                failures += 1
                if failures == _CHUNK:
                    raise InputError(f"{task.who}: it cannot make questions: {error}") from error
            else:
                failures = 0
                yield entry


def _is_held_out(entry: Entry) -> bool:
    return derive("reasoning-gym", "held out", entry["question"]) % _HELD_OUT_SHARE == 0
