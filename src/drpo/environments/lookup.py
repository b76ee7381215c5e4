"""Questions that take two look-ups in a small library, which the model searches with a tool."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from drpo.environments.contract import Environment
from drpo.environments.tools import ToolEpisode
from drpo.errors import InputError
from drpo.lazily import lazily
from drpo.rewards import Reward, in_process
from drpo.seeds import derive
from drpo.types import Problem

bm25s = lazily("bm25s")


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = [
    "Ada",
    "Boris",
    "Clara",
    "Dario",
    "Elin",
    "Farid",
    "Greta",
    "Hugo",
    "Irma",
    "Jonas",
    "Kira",
    "Leif",
    "Mira",
    "Noel",
    "Olga",
    "Pavel",
    "Rosa",
    "Simon",
    "Tilda",
    "Ugo",
]
_LAST = [
    "Tolan",
    "Brandt",
    "Ceder",
    "Duval",
    "Ekman",
    "Faro",
    "Grau",
    "Holm",
    "Ibsen",
    "Jarvi",
    "Kemp",
    "Lind",
    "Moro",
    "Nagy",
    "Orban",
    "Prade",
]
_TOWNS = [
    "Ostra",
    "Kelmar",
    "Vindal",
    "Torvik",
    "Lunde",
    "Sarnen",
    "Breg",
    "Calva",
    "Dorne",
    "Elvas",
    "Fosna",
    "Gavle",
    "Harth",
    "Isola",
    "Jarna",
    "Kolsva",
]
_VALLEYS = _words("Arno Belmont Corin Dalby Esk Furka Glomma Hallin")
_TRADES = _words("baker smith teacher doctor painter farmer tailor pilot")
_PEOPLE = 160
_HELD_OUT = 40


@in_process
@dataclass(frozen=True)
class Lookup:
    """The task "In which valley does X work?": the library says in which town X works, and where each town lies.

    The model calls the tool `search`, which returns the best passages by BM25, and then answers. An answer that names
    the valley, and no other, earns 1.

    Args:
        passages: that a search returns, 1 to 10.
        turns: at most.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> Lookup().sample(1, step=0, seed=0)[0].prompt
        'In which valley does Greta Faro work?'
    """

    passages: int = 2
    turns: int = 4

    def __post_init__(self) -> None:
        for name, value, high in (("passages", self.passages, 10), ("turns", self.turns, 64)):
            if type(value) is not int or not 1 <= value <= high:
                raise InputError(f"lookup: {name}={value!r} must be an integer from 1 to {high}")

    @property
    def reward(self) -> Reward:
        """The last turn names the valley."""
        return names_the_answer

    @property
    def max_turns(self) -> int:
        """As configured."""
        return self.turns

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw people who are not held out; see `Task.sample`."""
        rngs = [random.Random(derive("lookup", seed, step, slot)) for slot in range(n)]
        return [self._problem(f"{step}-{slot}", rng.randrange(_HELD_OUT, _PEOPLE)) for slot, rng in enumerate(rngs)]

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n of the people set aside; see `Task.held_out`."""
        return [self._problem(f"held-out-{i}", i) for i in range(min(n, _HELD_OUT))]

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return the episode of a problem."""

        def search(query: str) -> list[str]:
            """Search the library.

            Args:
                query: words to look for.
            """
            return find(query, self.passages)

        return ToolEpisode(problem, {"search": search})

    def _problem(self, name: str, person: int) -> Problem:
        who, town = _people()[person]
        return Problem.of_text(name, f"In which valley does {who} work?", _valley_of()[town])


def find(query: str, passages: int) -> list[str]:
    """Return the best passages of the library for a query, by BM25; none where no word of it occurs.

    Example:
        >>> find("Where is the town of Ostra?", 1)
        ['Ostra is a town in the valley of Esk.']
    """
    library = _library()
    words = bm25s.tokenize(query, show_progress=False)
    numbers, scores = _index().retrieve(words, k=min(passages, len(library)), show_progress=False)
    return [library[int(i)] for i, score in zip(numbers[0], scores[0], strict=True) if score > 0]


@in_process
def names_the_answer(problem: Problem, text: str) -> float:
    """Return 1 where a text names the valley that is asked for and no other, else 0."""
    named = {valley for valley in _VALLEYS if valley.casefold() in text.casefold()}
    return float(named == {problem.answer})


@lru_cache
def _people() -> Sequence[tuple[str, str]]:
    """Who works in which town."""
    rng = random.Random(derive("lookup", "people"))
    names = rng.sample([f"{first} {last}" for first in _FIRST for last in _LAST], _PEOPLE)
    return [(name, rng.choice(_TOWNS)) for name in names]


@lru_cache
def _valley_of() -> dict[str, str]:
    rng = random.Random(derive("lookup", "valleys"))
    return {town: rng.choice(_VALLEYS) for town in _TOWNS}


@lru_cache
def _library() -> Sequence[str]:
    rng = random.Random(derive("lookup", "trades"))
    people = [f"{name} works as a {rng.choice(_TRADES)} in {town}." for name, town in _people()]
    return [*people, *(f"{town} is a town in the valley of {valley}." for town, valley in _valley_of().items())]


@lru_cache
def _index() -> Any:
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(_library()), show_progress=False), show_progress=False)
    return index
