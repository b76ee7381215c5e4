"""Scoring by a reasoning-gym dataset's own scorer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from drpo.errors import InputError, nearest
from drpo.lazily import lazily
from drpo.types import Problem

reasoning_gym = lazily("reasoning_gym")

_OURS = ("seed", "size")


def make_dataset(name: str, arguments: Mapping[str, Any], seed: int, size: int) -> Any:
    """Build a reasoning-gym dataset.

    Args:
        name: its name in reasoning-gym: "countdown".
        arguments: fields of its config, except `seed` and `size`.
        seed: of its random stream, in [0, 2**31).
        size: number of items.

    Returns:
        The dataset: a `reasoning_gym.dataset.ProceduralDataset`.

    Raises:
        InputError: an unknown dataset or argument, or a value that the dataset rejects.

    Example:
        >>> make_dataset("basic_arithmetic", {"min_terms": 2, "max_terms": 2}, seed=0, size=1)[0]["question"]
        'Calculate -1515 / 15.'
    """
    datasets = reasoning_gym.factory.DATASETS
    if name not in datasets:
        raise InputError(f"unknown reasoning-gym dataset {name!r}{nearest(name, sorted(datasets))}")
    known = [f.name for f in fields(datasets[name][1]) if f.name not in _OURS]
    for argument in arguments:
        if argument in _OURS:
            raise InputError(f"reasoning-gym dataset {name!r}: {argument!r} is set by the task, not by its arguments")
        if argument not in known:
            raise InputError(f"reasoning-gym dataset {name!r} has no argument {argument!r}{nearest(argument, known)}")
    try:
        return reasoning_gym.create_dataset(name, **arguments, seed=seed, size=size)
    except (AssertionError, ValueError, TypeError) as error:  # the library checks its configs with assert
        raise InputError(f"reasoning-gym dataset {name!r} with {dict(arguments)}: {error}") from None


@dataclass(frozen=True)
class GymScore:
    """The scorer of a reasoning-gym dataset, as a picklable reward.

    Args:
        name: the dataset.
        arguments: fields of its config.

    Example:
        >>> entry = make_dataset("basic_arithmetic", {}, seed=0, size=1)[0]
        >>> problem = Problem.of_text("0", entry["question"], entry["answer"], data=entry)
        >>> GymScore("basic_arithmetic")(problem, f"<answer>{entry['answer']}</answer>")
        1.0
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @cached_property
    def _dataset(self) -> Any:
        return make_dataset(self.name, self.arguments, seed=0, size=1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the dataset: the pool's process builds its own."""
        return GymScore, (self.name, self.arguments)

    def __call__(self, problem: Problem, text: str) -> float:
        """Score the content of the last <answer>...</answer> of `text`, or the whole text if there is none.

        Args:
            problem: `data` is the dataset's entry.
            text: a completion.

        Returns:
            The score, in [0, 1] by reasoning-gym's convention.

        Raises:
            Exception: the scorer fails on the reference answer too, so the text is not the cause.
        """
        answer = reasoning_gym.utils.extract_answer(text)
        try:
            return float(self._dataset.score_answer(text.strip() if answer is None else answer, problem.data))
        except Exception:
            # Some scorers raise on text that they cannot parse. That is a wrong answer: as a failure, the completion
            # would be dropped and the policy would not learn from it.
            self._dataset.score_answer(problem.data["answer"], problem.data)
            return 0.0
