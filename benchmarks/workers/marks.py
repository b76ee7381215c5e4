"""Rewards that every competitor's environment can compute. Standard library only."""

import hashlib
import re
from typing import Any


def hashed(text: str) -> float:
    """Return a number in [0, 1) that is a function of the text alone, so that no group of samples is all alike.

    Args:
        text: a completion.

    Example:
        >>> 0 <= hashed("4") < 1 and hashed("4") == hashed("4")
        True
    """
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32


def last_number(text: str, answer: str) -> float:
    """Return 1.0 where the last integer of the text is the answer, else 0.0.

    Args:
        text: a completion.
        answer: an integer.

    Example:
        >>> last_number("3 + 4 = 7.", "7"), last_number("none", "7")
        (1.0, 0.0)
    """
    found = re.findall(r"\d+", text.replace(",", ""))
    return float(bool(found) and found[-1] == answer)


def right(problem: Any, text: str) -> float:
    """A reward of some microseconds: 1.0 where the text's last integer is the problem's answer."""
    return last_number(text, problem.answer)


def right_of_both(item: tuple[Any, str]) -> float:
    """The same for `multiprocessing`, whose functions have one argument."""
    return right(*item)
