"""The settings of the processes that run environments."""

from dataclasses import dataclass

from drpo.workers.limits import require_limits


@dataclass(frozen=True)
class EnvironmentConfig:
    """How a run holds its environments, unless they are declared `in_process`.

    Args:
        processes: processes that hold environments, at least 1; an episode stays in one of them.
        seconds: the wall-clock limit of one call of an environment, above 0.
        memory_gb: the limit, in GiB, on the address space that a process allocates after it has imported the
            environment, for all its episodes together; 0 is no limit. No effect outside Linux.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> EnvironmentConfig(processes=2).seconds
        10.0
    """

    processes: int = 1
    seconds: float = 10.0
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        require_limits("environment_pool", self.processes, self.seconds, self.memory_gb)
