"""The limits of worker processes, as a configuration states them."""

import math

from drpo.errors import InputError


def require_limits(name: str, processes: int, seconds: float, memory_gb: float) -> None:
    """Raise unless a configuration's limits are in range.

    Args:
        name: of the configuration, as error messages name it.
        processes: number of processes, at least 1.
        seconds: wall-clock limit of one request, above 0.
        memory_gb: limit in GiB on what a process allocates; 0 is no limit.

    Raises:
        InputError: a value out of its range.
    """
    if processes < 1:
        raise InputError(f"{name}.processes={processes}: must be at least 1")
    if not 0 < seconds < math.inf:
        raise InputError(f"{name}.seconds={seconds}: must be finite and above 0")
    if not 0 <= memory_gb < math.inf:
        raise InputError(f"{name}.memory_gb={memory_gb}: must be finite and 0 (no limit) or more")
