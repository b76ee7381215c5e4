"""Statistics of a training curve: its mean, and the step at which it reaches a threshold."""

import math
from collections.abc import Sequence
from itertools import pairwise

from scipy.integrate import trapezoid

from drpo.errors import InputError
from drpo.lab.statistics import require_finite


def area_under_curve(steps: Sequence[float], values: Sequence[float]) -> float:
    """Return the mean of a curve over its steps: the area (trapezoids) divided by the span, in the value's unit.

    Args:
        steps: strictly increasing, at least one.
        values: one per step.

    Raises:
        InputError: not a curve.

    Example:
        >>> area_under_curve([0, 1, 3], [0.0, 1.0, 1.0])
        0.8333333333333334
    """
    _require_curve(steps, values)
    return float(trapezoid(values, steps)) / (steps[-1] - steps[0]) if len(steps) > 1 else float(values[0])


def steps_to(steps: Sequence[float], values: Sequence[float], threshold: float) -> float | None:
    """Return where a curve first reaches a threshold, by linear interpolation.

    The curve may fall below the threshold again. A noisy curve reaches it too early: smooth it first (`smoothed`).

    Args:
        steps: strictly increasing, at least one.
        values: one per step.
        threshold: the value to reach from below.

    Returns:
        The step; the first step if the curve begins at or above the threshold; None if it never reaches it.

    Raises:
        InputError: not a curve.

    Example:
        >>> steps_to([0, 10, 20], [0.0, 0.4, 0.8], 0.5), steps_to([0, 10, 20], [0.0, 0.4, 0.8], 0.9)
        (12.5, None)
    """
    _require_curve(steps, values)
    first = next((i for i, value in enumerate(values) if value >= threshold), None)
    if first is None:
        return None
    if first == 0:
        return float(steps[0])
    share = (threshold - values[first - 1]) / (values[first] - values[first - 1])
    return float(steps[first - 1] + share * (steps[first] - steps[first - 1]))


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Return the moving average over `width` values; it has width - 1 fewer values.

    Example:
        >>> smoothed([0.0, 1.0, 2.0, 6.0], 3)
        [1.0, 3.0]
    """
    if width < 1:
        raise InputError(f"width={width}: must be at least 1")
    windows = [values[i : i + width] for i in range(len(values) - width + 1)]
    return [math.fsum(window) / width for window in windows]


def _require_curve(steps: Sequence[float], values: Sequence[float]) -> None:
    if not steps or len(steps) != len(values) or any(a >= b for a, b in pairwise(steps)):
        raise InputError(
            f"a curve of {len(steps)} steps and {len(values)} values: steps must increase, a value at each"
        )
    require_finite(values)
