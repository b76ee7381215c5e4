"""How a warm-up by the model's own right answers is asked for: `best_of(8)`. No torch."""

import re
from dataclasses import dataclass

from drpo.errors import InputError
from drpo.spec import Registry

MADE_UP = 256
"""Problems that are answered where a task makes up its own and no number is given."""
MOST = 2**20
"""Of answers and problems: an upper bound that catches typos."""


@dataclass(frozen=True)
class BestOf:
    """Before RL the model answers problems; it is fine-tuned on those of its answers that are right.

    An answer is learnt from where its reward is at least `right`, it was not cut at the limit of tokens, and it is not
    there already.

    Args:
        samples: answers to each problem.
        right: least reward of a right answer.
        problems: how many are answered; 0 is all of a task that has a finite number, else 256.
        answers: most answers to one problem that are learnt from.
        epochs: how often each is trained on.
        batch: most answers of an update.
        learning_rate: the peak; None is 2e-5, with adapters 2e-4.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> BestOf(samples=4, epochs=1.0)
        BestOf(samples=4, right=1.0, problems=0, answers=4, epochs=1.0, batch=16, learning_rate=None)

    Source: rejection sampling fine-tuning, Yuan et al. (arXiv 2308.01825); STaR, Zelikman et al. (arXiv 2203.14465).
    """

    samples: int = 8
    right: float = 1.0
    problems: int = 0
    answers: int = 4
    epochs: float = 2.0
    batch: int = 16
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("problems", 0), ("answers", 1), ("batch", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value <= MOST:
                raise InputError(f"{name}={value!r}: must be a whole number from {least} to {MOST:,}")
        for name, low, high in (("right", -MOST, MOST), ("epochs", 0, 10_000), ("learning_rate", 0, 1)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and low < value <= high) and not (name == "learning_rate" and value is None):
                raise InputError(f"{name}={value!r}: must be a number above {low:,} and at most {high:,}")


REGISTRY: Registry[BestOf] = Registry("warm-up", {"best_of": BestOf}, BestOf, explicit=frozenset({"best_of"}))

_MEANT = re.compile(r"(?:best[\s_-]*of)?[\s_-]*\(?\s*(?:n\s*=\s*)?(\d*)\s*\)?", re.IGNORECASE)


def require_spec(text: str) -> None:
    """Raise for what is meant as `best_of(8)`, and written otherwise.

    Args:
        text: as the command line has it.

    Raises:
        InputError: it is; the message has the spec.

    Example:
        >>> require_spec("best-of 8")
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: --warm-up 'best-of 8': write it as --warm-up 'best_of(8)'
    """
    meant = _MEANT.fullmatch(text.strip())
    if meant and not re.fullmatch(r"best_of(\(\d+\))?", text.strip(), re.IGNORECASE):
        raise InputError(f"--warm-up {text!r}: write it as --warm-up 'best_of({meant[1] or 8})'")
