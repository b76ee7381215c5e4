"""Where a run of fine-tuning goes on with other settings: its chapters, as those of RL."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from drpo.errors import InputError
from drpo.train.chapters import Chapter, going_on, read_chapters
from drpo.train.config import to_json
from drpo.train.config.sft import SFTConfig, load_sft
from drpo.train.records import EVALUATIONS, read_records

_MAY_CHANGE = {
    "steps": "trainer.steps",
    "optimizer": "optimizer.policy",
    "schedule": "optimizer.schedule",
    "max_grad_norm": "optimizer.max_grad_norm",
    "micro_batch_tokens": "trainer.micro_batch_tokens",
    "checkpoint_activations": "trainer.checkpoint_activations",
    "eval_every": "trainer.eval_every",
    "checkpoint_every": "checkpoints.every",
    "keep_checkpoints": "checkpoints.keep",
}
"""Options that may be given at a resume -> where config.json has their field; of the optimiser, the learning rate."""


def chapters_of(folder: Path, config: SFTConfig, step: int, evaluates: bool) -> list[Chapter]:
    """Return the chapters of a run that goes on after `step` steps: those recorded, and one more where it changes.

    Args:
        folder: of the run; it may be new.
        config: to go on with.
        step: steps done.
        evaluates: whether conversations are held out.

    Raises:
        InputError: chapters.jsonl cannot be read.
    """
    known = read_chapters(folder)
    try:
        before = load_sft(folder)
    except InputError:  # a new run, or one whose configuration is damaged and is written again
        return [chapter for chapter in known if chapter.step < step]
    standing, changes = going_on(known, _options(before), _options(config), step)
    begun = step > 0 or bool(read_records(folder / EVALUATIONS))
    if not changes or not begun:
        return standing
    return [*standing, Chapter(step, changes, differences(changes, config, step, evaluates))]


def _options(config: SFTConfig) -> dict[str, Any]:
    record = to_json(config)
    return {name: reduce(getitem, path.split("."), record) for name, path in _MAY_CHANGE.items()}


def differences(
    changes: Mapping[str, tuple[Any, Any]], config: SFTConfig, step: int, evaluates: bool
) -> tuple[str, ...]:
    """Say what a change after `step` steps makes different from one run with the present number of steps.

    Args:
        changes: name of an option -> its value before and now.
        config: the present configuration.
        step: steps done.
        evaluates: whether conversations are held out.

    Example:
        >>> differences({"steps": (20, 40)}, SFTConfig().with_steps(40), 20, evaluates=False)
        ('schedule linear counts on all steps: until here the learning rates were those of 20',)
    """
    lines, planned, every = [], changes.get("steps", (config.trainer.steps,))[0], config.trainer.eval_every
    if "steps" in changes and not changes.keys() & {"schedule", "optimizer"}:
        before = config.with_steps(planned)
        if any(before.learning_rate(i) != config.learning_rate(i) for i in range(step)):
            counts = f"schedule {_options(config)['schedule']} counts on all steps"
            lines.append(f"{counts}: until here the learning rates were those of {planned}")
    ended = "steps" in changes and step == planned > 0
    if ended and evaluates and step != config.trainer.steps and not (every and step % every == 0):
        lines.append(f"one run would not have evaluated after step {step}")
    return tuple(lines)


def with_changes(config: SFTConfig, options: Mapping[str, Any], learning_rate: float | None = None) -> SFTConfig:
    """Return the configuration with other values of options that may change; None leaves one as it is.

    Args:
        config: of the run.
        options: by name, as objects.
        learning_rate: the peak.

    Raises:
        InputError: a value that a field refuses.

    Example:
        >>> with_changes(SFTConfig(), {"steps": 8, "eval_every": None}, 1e-5).optimizer.policy.learning_rate
        1e-05
    """
    by_group: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        group, _, field = _MAY_CHANGE[name].partition(".")
        if value is not None:
            by_group.setdefault(group, {})[field] = value
    if learning_rate is not None:
        policy: Any = config.optimizer.policy
        by_group.setdefault("optimizer", {})["policy"] = replace(policy, learning_rate=learning_rate)
    anything: Any = config
    changed = {group: replace(getattr(anything, group), **values) for group, values in by_group.items()}
    return replace(config, **changed)
