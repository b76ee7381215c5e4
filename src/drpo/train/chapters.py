"""The chapters of a run: where it went on with other settings than before. Imports no torch.

config.json holds the present configuration; chapters.jsonl, a line for each chapter, what was changed and where.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from drpo.errors import InputError, as_typed, counted, one_line
from drpo.files import write_text
from drpo.train.fields import FIELDS
from drpo.train.records import read_records

CHAPTERS = "chapters.jsonl"

MAY_CHANGE = (
    "steps",
    "learning_rate",
    "schedule",
    "max_grad_norm",
    "objective",
    "advantage",
    "whiten",
    "reduction",
    "sequence",
    "discount",
    "reference_kl",
    "kl_in_reward",
    "entropy_bonus",
    "overlong",
    "curriculum",
    "dynamic_sampling",
    "sampling.samples",
    "sampling.max_new_tokens",
    "sampling.temperature",
    "sampling.top_logprobs",
    "micro_batch_tokens",
    "checkpoint_activations",
    "eval_every",
    "eval_samples",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped",
)
"""Options that may be given at a resume; each acts from the next step on."""

_WHY = {
    "name": "its trackers know it by it",
    "seed": "every random number of the run follows from it",
    "warm_up": "it comes before the first step",
    "model": "the checkpoint's weights and the sampler's are those of this model",
    "data": "the problems of the steps done were drawn with it, and none is to be drawn twice",
    "rollout": "the rollouts of the steps done, and those in flight, were sampled with it",
    "rewards": "the rewards of the steps done are of it, and would not compare with those to come",
    "objective": "the checkpoint has a critic of these settings, or none",
    "optimizer": "the checkpoint's moments are this optimizer's; --learning-rate may change",
    "trainer": "the steps done were divided so",
    "evaluation": "training left these problems out alone, and gains are of them; `drpo eval` scores on others",
}
"""Group of a field -> why a resume keeps it."""


@dataclass(frozen=True)
class Chapter:
    """A part of a run that began with other settings than the part before.

    Args:
        step: steps that were done before it.
        changes: name of an option -> its value before and since, as JSON.
        differs: what is otherwise than in one run that had as many steps from its beginning, a sentence each; empty
            where nothing is, except for the changes themselves.
    """

    step: int
    changes: Mapping[str, tuple[Any, Any]]
    differs: tuple[str, ...] = ()

    @property
    def lengthens(self) -> bool:
        """Whether the number of steps is all that was changed."""
        return set(self.changes) == {"steps"}


def read_chapters(folder: Path) -> list[Chapter]:
    """Return the chapters of a run, the earliest first; none where its settings never changed.

    Raises:
        InputError: chapters.jsonl cannot be read.
    """
    path = folder / CHAPTERS
    try:
        return [msgspec.convert(record, Chapter) for record in read_records(path)]
    except msgspec.ValidationError as error:
        raise InputError(f"{path} cannot be read: {error}".replace("`", "")) from None


def write_chapters(folder: Path, chapters: Sequence[Chapter]) -> None:
    """Write the chapters of a run, all or nothing; without any there is no file."""
    if chapters:
        write_text(folder / CHAPTERS, "".join(f"{json.dumps(asdict(chapter))}\n" for chapter in chapters))
    else:
        (folder / CHAPTERS).unlink(missing_ok=True)


def going_on(
    chapters: Sequence[Chapter], config: Mapping[str, Any], now: Mapping[str, Any], step: int
) -> tuple[list[Chapter], dict[str, tuple[Any, Any]]]:
    """Return the chapters that stand where a run goes on after `step` steps, and what changes there.

    Chapters that began at this step or later have no step left: what they changed, and what changes now, are one.

    Args:
        chapters: recorded so far.
        config: the recorded configuration, by option.
        now: the configuration to go on with, by option.
        step: steps done.

    Example:
        >>> longer = Chapter(4, {"steps": (4, 8)})
        >>> going_on([longer], {"steps": 8}, {"steps": 8}, 4)  # killed before its next checkpoint
        ([], {'steps': (4, 8)})
        >>> going_on([longer], {"steps": 8}, {"steps": 12}, 8)[1]
        {'steps': (8, 12)}
    """
    standing = [chapter for chapter in chapters if chapter.step < step]
    before = dict(config)
    for chapter in reversed(chapters[len(standing) :]):
        before |= {name: old for name, (old, _) in chapter.changes.items()}
    changes = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
    return standing, changes


def value_at(chapters: Sequence[Chapter], name: str, step: int, now: Any) -> Any:
    """Return what the field of an option was in a step.

    Args:
        chapters: of the run, the earliest first.
        name: of the option.
        step: counted from 1.
        now: the field's present value.

    Example:
        >>> chapters = [Chapter(4, {"objective": ("none", "drpo(0.2)")})]
        >>> value_at(chapters, "objective", 4, "drpo(0.2)"), value_at(chapters, "objective", 5, "drpo(0.2)")
        ('none', 'drpo(0.2)')
    """
    later = (chapter for chapter in chapters if chapter.step >= step and name in chapter.changes)
    return next((chapter.changes[name][0] for chapter in later), now)


def described(chapter: Chapter) -> str:
    """Say in a line what a chapter changed, and what it makes different from a single run.

    Example:
        >>> described(Chapter(4, {"steps": (4, 8)}))
        'from step 5: steps 4 -> 8; as one run of 8 steps'
        >>> described(Chapter(4, {"reference_kl": (0.0, 0.1)}))
        'from step 5: reference_kl 0.0 -> 0.1'
    """
    changes = ", ".join(f"{name} {_shown(old)} -> {_shown(new)}" for name, (old, new) in chapter.changes.items())
    same = f"; as one run of {counted(chapter.changes['steps'][1], 'step')}" if chapter.lengthens else ""
    differs = "".join(f"; {line}" for line in chapter.differs)
    return one_line(f"from step {chapter.step + 1}: {changes}{differs or same}")


def require_may_change(names: Collection[str], folder: Path) -> None:
    """Raise if an option is one that a resumed run keeps.

    Args:
        names: of options; those that are no field of a run are let through.
        folder: of the run, for the message.

    Raises:
        InputError: it is; the message says why, and what to do instead.
    """
    for given in sorted(names):
        name = "template" if given.startswith("template.") else given.removeprefix("no_")
        if name in FIELDS and name not in MAY_CHANGE:
            raise InputError(
                f"--{given.replace('_', '-')}: a resumed run keeps it, since {_WHY[FIELDS[name].partition('.')[0]]}; "
                f"start a new run from its weights: drpo train --from {as_typed(folder)}"
            )


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
