"""Public sets of mathematics problems, read from the hub or from a folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any, ClassVar

from drpo.errors import InputError
from drpo.rewards import Reward
from drpo.tasks.records import Counts, Records
from drpo.types import Problem

BOXED = "{prompt}\n\nReason step by step, and put the final answer in \\boxed{}."


@dataclass(frozen=True)
class Known:
    """A data set with known fields; subclasses define them.

    Args:
        path: a folder with train.jsonl and test.jsonl (or .parquet) as the set has them; None loads it from the hub.
    """

    path: str | None = None

    hub: ClassVar[Records]
    """The set on the hub."""
    folder: ClassVar[Mapping[str, Any]] = {"config": None}
    """Arguments of `Records` that differ for a folder."""

    @cached_property
    def records(self) -> Records:
        """The set as `Records`."""
        # A copy: records cache their rows, which must not outlive the task.
        return replace(self.hub) if self.path is None else replace(self.hub, path=self.path, **self.folder)

    @property
    def reward(self) -> Reward:
        """The default reward."""
        return self.records.reward

    @property
    def counts(self) -> Counts:
        """The counts of kept and dropped rows; reads the data."""
        return self.records.counts

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """See `Records.sample`."""
        return self.records.sample(n, step, seed)

    def training_problems(self) -> list[Problem]:
        """See `Records.training_problems`."""
        return self.records.training_problems()

    def held_out(self, n: int) -> list[Problem]:
        """See `Records.held_out`."""
        return self.records.held_out(n)


class GSM8K(Known):
    """Grade-school word problems: 7,473 to train on, 1,319 held out (Cobbe et al. 2021, arXiv 2110.14168)."""

    hub = Records("openai/gsm8k", "question", "answer", template=BOXED, config="main", test="test", answer_after="####")


class Math500(Known):
    """500 competition problems, for evaluation only (Lightman et al. 2023, arXiv 2305.20050)."""

    hub = Records("HuggingFaceH4/MATH-500", "problem", "answer", template=BOXED, split=None, test="test")


class AIME24(Known):
    """AIME 2024 I and II, 30 problems, for evaluation only."""

    hub = Records("HuggingFaceH4/aime_2024", "problem", "answer", template=BOXED, split=None, test="train")
    folder: ClassVar[Mapping[str, Any]] = {"test": "test"}


class AIME25(Known):
    """AIME 2025 I and II, 30 problems, for evaluation only."""

    hub = Records("math-ai/aime25", "problem", "answer", template=BOXED, split=None, test="test")


@dataclass(frozen=True)
class AIME:
    """AIME 2024 and 2025 together, 60 problems, for evaluation only. The DRPO paper reports avg@16 on it.

    Args:
        path: a folder that holds the folders aime24 and aime25; None loads both from the hub.
    """

    path: str | None = None

    @property
    def reward(self) -> Reward:
        """The reward of each year's set."""
        return AIME24().reward

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Raise: the set is for evaluation only."""
        raise InputError("aime: for evaluation only; it has nothing to train on")

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n problems, alternating between the years; see `Task.held_out`."""
        folders = [None if self.path is None else f"{self.path}/{name}" for name in ("aime24", "aime25")]
        years = [kind(folder).held_out(n) for kind, folder in zip((AIME24, AIME25), folders, strict=True)]
        in_turn = [p for pair in zip_longest(*years) for p in pair if p is not None]
        return [replace(p, id=f"held-out-{i}") for i, p in enumerate(in_turn[:n])]


class AMC23(Known):
    """AMC 12 2023, the 40 problems with integer answers, for evaluation only."""

    hub = Records("math-ai/amc23", "question", "answer", template=BOXED, split=None, test="test")


class DapoMath(Known):
    """DAPO-Math-17k, competition problems with integer answers (Yu et al. 2025, arXiv 2503.14476).

    256 questions are held out. Training excludes questions whose first 80 characters equal those of a held-out one,
    because the set has many variants of a problem. The set shares problems with MATH-500 and AMC 2023, but not with
    AIME.
    """

    hub = Records(
        "open-r1/DAPO-Math-17k-Processed", "prompt", "solution", template=BOXED, config="all", overlap_prefix=80
    )
    folder: ClassVar[Mapping[str, Any]] = {
        "config": None,
        "prompt": "prompt.0.content",
        "answer": "reward_model.ground_truth",
    }
