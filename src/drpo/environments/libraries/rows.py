"""What tasks share whose environments start from a row: the rows are the problems of another task."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from drpo.environments.libraries.imports import made_anew, require_turns
from drpo.errors import InputError
from drpo.rewards import Reward
from drpo.spec import parse_spec
from drpo.tasks import REGISTRY, Task
from drpo.types import Problem


@dataclass(frozen=True)
class RowsTask:
    """A task whose problems are another's, each solved in an environment of its own.

    A subclass opens the environments.

    Args:
        environment: names the environment.
        rows: the spec of the task with the problems: "records('rows.jsonl', 'question', 'answer')".
        turns: at most, 1 to 1024.
    """

    environment: str
    rows: str
    turns: int = 8
    who: ClassVar[str] = "task"

    def __reduce__(self) -> Any:
        """As of all tasks of libraries."""
        return made_anew(self)

    @cached_property
    def rows_task(self) -> Task:
        """The task with the problems."""
        return parse_spec(self.rows, REGISTRY)

    @property
    def reward(self) -> Reward:
        """That of the rows."""
        return self.rows_task.reward

    @property
    def max_turns(self) -> int:
        """`turns`."""
        return self.turns

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw problems of the rows; see `Task.sample`."""
        return self.rows_task.sample(n, step, seed)

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n evaluation problems of the rows; see `Task.held_out`."""
        return self.rows_task.held_out(n)

    def require(self) -> None:
        """Raise unless the fields are in their ranges and the rows' spec names a task.

        Raises:
            InputError: a field out of its range, or no task.
        """
        require_turns(self.who, self.turns)
        if callable(getattr(self.rows_task, "open", None)):
            raise InputError(f"{self.who}: rows={self.rows!r} has environments of its own; name a task without them")
