"""Counts of what rewards ask of endpoints: calls, retries, seconds and tokens, by name of the metric."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

PREFIX = "endpoint_"
"""Of the names of these metrics (`drpo.train.metric_tables.ENDPOINT_METRICS`)."""

_USAGE: ContextVar[Counter[str] | None] = ContextVar("drpo_reward_usage", default=None)


@contextmanager
def counted() -> Iterator[Mapping[str, float]]:
    """Yield the counts of what is counted inside; calls that are awaited side by side have each their own.

    Example:
        >>> with counted() as usage:
        ...     count("calls", 2)
        >>> dict(usage)
        {'endpoint_calls': 2}
    """
    usage: Counter[str] = Counter()
    token = _USAGE.set(usage)
    try:
        yield usage
    finally:
        _USAGE.reset(token)


def count(name: str, n: float = 1) -> None:
    """Add to a count of the reward's call in progress; no effect outside one."""
    usage = _USAGE.get()
    if usage is not None:
        usage[PREFIX + name] += n  # type: ignore[assignment]


def total(usages: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums of counts, by name.

    Example:
        >>> total([{"endpoint_calls": 1}, {}, {"endpoint_calls": 2, "endpoint_retries": 1}])
        {'endpoint_calls': 3, 'endpoint_retries': 1}
    """
    sums: dict[str, float] = {}
    for usage in usages:
        for name, n in usage.items():
            sums[name] = sums.get(name, 0) + n
    return sums
