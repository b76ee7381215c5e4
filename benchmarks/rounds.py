"""Turns: every entrant once, then every entrant again; and what the rounds say, in pairs."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.cases import Case, Entrant
from benchmarks.floor import Step
from benchmarks.worker_pool import WorkerError, WorkerPool

Rounds = list[dict[str, dict[str, Any]]]
"""Round by round: entrant -> what its worker answered. One that failed is missing from then on."""

FLOOR = "its floor"
"""In the place of an entrant that a step is compared with: what its matrix products take at the least."""

CASE_SECONDS = 240.0
"""No further round begins when a case's rounds have taken this long; how many there were stands in the table."""


def take_turns(
    entrants: Sequence[Entrant],
    ask: Callable[[Entrant, Mapping[str, Any]], dict[str, Any]],
    repeats: int,
    *,
    seconds: float = CASE_SECONDS,
    watch: Callable[[str], None] = lambda text: None,
) -> tuple[Rounds, dict[str, str]]:
    """Warm every entrant up, then go round them repetition by repetition.

    Args:
        entrants: in the order of their turns.
        ask: has one of them do a request; raises WorkerError where it fails.
        repeats: rounds, >= 1.
        seconds: after these no new round begins.
        watch: is told whose turn it is.

    Returns:
        The rounds without the warm-up, and entrant -> why it failed.
    """
    failures: dict[str, str] = {}
    rounds: Rounds = []
    begun = time.perf_counter()
    for number in range(repeats + 1):
        if number == 1:
            begun = time.perf_counter()
        elif number > 1 and time.perf_counter() - begun > seconds:
            break
        answers = {}
        for entrant in entrants:
            if entrant.name in failures:
                continue
            watch(f"{entrant.name}, {f'round {number} of {repeats}' if number else 'warming up'}")
            extra = {} if number else entrant.warm_up
            try:
                answers[entrant.name] = ask(entrant, {**entrant.request, **extra, "round": number})
            except WorkerError as error:
                failures[entrant.name] = str(error)
        if number:
            rounds.append(answers)
    return rounds, failures


def measure(
    case: Case, pool: WorkerPool, repeats: int, watch: Callable[[str], None], seconds: float = CASE_SECONDS
) -> dict[str, Any]:
    """Measure a case.

    Args:
        case: what to measure.
        pool: has the workers; those of other cases are ended first.
        repeats: rounds.
        watch: is told whose turn it is.
        seconds: as for `take_turns`.

    Returns:
        A record for the results' file: the rounds as measured, with what is needed to read them.
    """
    pool.keep(e.worker for e in case.entrants)
    about: dict[str, Any] = {}
    rejected = dict(case.skipped)
    ready = []
    where = f"{case.part}: {case.name}: "
    for entrant in case.entrants:
        watch(f"{where}{entrant.name}, loading")
        try:
            about[entrant.name] = pool.get(entrant.worker).about
            ready.append(entrant)
        except WorkerError as error:
            rejected[entrant.name] = str(error)
    rounds, failures = take_turns(
        ready,
        lambda entrant, request: pool.get(entrant.worker).ask(request),
        repeats,
        seconds=seconds,
        watch=lambda text: watch(where + text),
    )
    for entrant in ready:
        if entrant.name in failures:  # a GPU that met an error may answer every further request with it
            pool.discard(entrant.worker)
    return {
        "part": case.part,
        "name": case.name,
        "baseline": case.baseline,
        "entrants": [e.name for e in case.entrants] + [n for n in case.skipped if n not in about],
        "parameters": dict(case.parameters),
        "about": about,
        "failures": {**rejected, **failures},
        "rounds": rounds,
        "when": time.strftime("%Y-%m-%d"),
    }


def column(rounds: Rounds, entrant: str, field: str) -> list[float]:
    """Return an entrant's figures, round by round, those that there are.

    Args:
        rounds: of a case.
        entrant: whose.
        field: name of the figure; "phases.update" is the "update" among the "phases".

    Example:
        >>> column([{"a": {"seconds": 2.0}}, {}, {"a": {"seconds": 3.0}}], "a", "seconds")
        [2.0, 3.0]
    """
    found = (_dig(r[entrant], field) for r in rounds if entrant in r)
    return [float(x) for x in found if x is not None]


def ratios(rounds: Rounds, entrant: str, baseline: str, field: str = "seconds") -> list[float]:
    """Return entrant / baseline within each round that has both.

    Args:
        rounds: of a case.
        entrant: above the line.
        baseline: below it.
        field: of which figure.

    Example:
        >>> ratios([{"a": {"seconds": 6.0}, "b": {"seconds": 2.0}}, {"b": {"seconds": 2.0}}], "a", "b")
        [3.0]
    """
    pairs = ((_dig(r.get(entrant, {}), field), _dig(r.get(baseline, {}), field)) for r in rounds)
    return [float(a / b) for a, b in pairs if a is not None and b]


def floors(record: Mapping[str, Any], entrant: str, *, shared: bool = True) -> list[float]:
    """Return how many times the floor a step took, round by round.

    The floor is that of the tokens which this entrant had, at the median rate of matrix products in the same rounds.

    Args:
        record: of a case of the part "step".
        entrant: whose step.
        shared: each prompt counts once per group; else once per sample.

    Returns:
        Nothing where no products, no shapes or no steps were measured.
    """
    parameters, rounds = record["parameters"], record["rounds"]
    rates = column(rounds, "matrix products", f"rates.{parameters['precision']}")
    shapes = [about["shapes"] for about in record["about"].values() if "shapes" in about]
    if not rates or not shapes:
        return []
    least = []
    for answer in (answers[entrant] for answers in rounds if entrant in answers):
        step = Step(
            body=shapes[0]["body"],
            head=shapes[0]["head"],
            prompts=parameters["prompts"],
            rows=answer["rows"],
            prompt_tokens=answer["prompt_tokens"] * parameters["prompts"] / answer["rows"],
            sampled=answer["tokens"],
        )
        least.append(answer["seconds"] / step.seconds(median(rates), shared=shared))
    return least


def times(record: Mapping[str, Any], entrant: str, other: str) -> list[float]:
    """Return how many times the seconds of another, or of `FLOOR`, an entrant took, round by round.

    Args:
        record: of a case.
        entrant, other: above the line, and below it.
    """
    return floors(record, entrant) if other == FLOOR else ratios(record["rounds"], entrant, other)


def summary(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Return median, least and greatest, or None where there is nothing.

    Example:
        >>> summary([3.0, 1.0, 2.0])
        (2.0, 1.0, 3.0)
    """
    return (median(values), min(values), max(values)) if values else None


def _dig(record: Mapping[str, Any], field: str) -> Any:
    value: Any = record
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
