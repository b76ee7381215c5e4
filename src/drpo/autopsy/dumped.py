"""The record of a dumped rollout, which every reader returns, and the record of a format."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Column: TypeAlias = NDArray[Any]


@dataclass(frozen=True, eq=False, slots=True)
class Dumped:
    """One rollout of a dump: M sampled tokens, without an environment's.

    Args:
        step: of the optimiser, as the dump counts it.
        group: shared by the rollouts of one prompt within a step.
        reward: None where the dump has none.
        length: sampled tokens; characters of `text` where the dump has no tokens.
        prompt, text, answer: as texts; may be empty.
        parts: name of a part of the reward -> its value.
        failure: why there is no reward, if the dump says so.
        cut: whether it ended at the limit of tokens; None where the dump does not say.
        held_out: whether an evaluation sampled it; then it was not trained on.
        update: which update of the step trained on it, from 0.
        reward_mean: mean reward of the step, where the dump has that and no rewards of rollouts.
        token_ids: [M] int64. This and the fields below are None where the dump lacks them.
        behavior_logp: [M] float32, nats; of the sampler.
        logp: [M] float32, nats; of the policy before the update.
        advantages: [M] float32, or [1] where all tokens have the same.
        entropy: [M] float32, nats; the policy's.
    """

    step: int
    group: str
    reward: float | None
    length: int
    prompt: str = ""
    text: str = ""
    answer: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None
    cut: bool | None = None
    held_out: bool = False
    update: int = 0
    reward_mean: float | None = None
    token_ids: Column | None = None
    behavior_logp: Column | None = None
    logp: Column | None = None
    advantages: Column | None = None
    entropy: Column | None = None

    def fault(self) -> str | None:
        """Return the first contradiction between the fields, in a line; None without one."""
        if self.length < 0 or (self.token_ids is not None and len(self.token_ids) != self.length):
            return f"{self.length} sampled tokens do not fit its token_ids"
        for name in ("behavior_logp", "logp", "advantages", "entropy"):
            column = getattr(self, name)
            if column is None:
                continue
            if len(column) != self.length and not (name == "advantages" and len(column) == 1):
                return f"{len(column)} {name} of {self.length} sampled tokens"
            if name in ("advantages", "entropy") and not np.isfinite(column).all():
                return f"{name}: must be finite numbers"
        return None


@dataclass(frozen=True, eq=False)
class Format:
    """A format of dumps.

    Args:
        name: of the framework and its files.
        version: of the framework whose writing code was read.
        suffix: of its files.
        keys: names that its first record, or its parquet schema, contains.
        read: yields the rollouts of a file, in order; receives the path.
        objective: spec of the framework's default.
        remedies: name in `judge.LACKING` -> how to make the framework write it.
        options: an option of ours in the advice of a warning -> the framework's.
    """

    name: str
    version: str
    suffix: str
    keys: frozenset[str]
    read: Callable[[Path], Iterator[Dumped]]
    objective: str
    remedies: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)


def joined(parts: Sequence[Column | None]) -> Column | None:
    """Join a column of a rollout's pieces; None without pieces, or where a piece lacks the column."""
    known = [part for part in parts if part is not None]
    if not parts or len(known) < len(parts):
        return None
    return known[0] if len(known) == 1 else np.concatenate(known)
