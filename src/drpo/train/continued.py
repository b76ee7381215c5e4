"""Where a run goes on with other settings: its chapters, and what they make different from a single run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drpo.errors import InputError
from drpo.train.chapters import Chapter, going_on, read_chapters
from drpo.train.config import Run, configure, flat_json, learning_rate, load_run
from drpo.train.records import EVALUATIONS, read_records

Changes = Mapping[str, tuple[Any, Any]]
OF_A_COMPLETION = ("sampling.max_new_tokens", "sampling.temperature", "sampling.top_p", "sampling.top_k")
"""Sampling settings that evaluations share."""


def chapters_of(folder: Path, run: Run, step: int) -> list[Chapter]:
    """Return the chapters of a run that goes on after `step` steps: those recorded, and one more where it changes.

    Args:
        folder: of the run; it may be new.
        run: the configuration to go on with.
        step: steps done.

    Raises:
        InputError: chapters.jsonl cannot be read.
    """
    known = read_chapters(folder)
    try:
        config = flat_json(load_run(folder, trust_remote_code=False))
    except InputError:  # a new run, or one whose configuration is damaged and is written again
        return [chapter for chapter in known if chapter.step < step]
    now = flat_json(run)
    if all(str(record["engine"]).startswith("http") for record in (config, now)):
        config["engine"] = now["engine"]  # the address of a server is no setting
    standing, changes = going_on(known, config, now, step)
    begun = step > 0 or bool(read_records(folder / EVALUATIONS))
    return [*standing, Chapter(step, changes, differences(changes, run, step))] if changes and begun else standing


def samples_anew(chapters: Sequence[Chapter], step: int) -> bool:
    """Return whether completions sampled ahead before `step` were sampled with settings that changed there."""
    here = (chapter for chapter in chapters if chapter.step == step)
    return any(_of_sampling(name) for chapter in here for name in chapter.changes)


def _of_sampling(name: str) -> bool:
    return name.startswith("sampling.") or name in ("curriculum", "dynamic_sampling")


def differences(changes: Changes, run: Run, step: int) -> tuple[str, ...]:
    """Say what a change after `step` steps makes different from one run with the present number of steps.

    Args:
        changes: name of an option -> its value before and now.
        run: the present configuration.
        step: steps done.

    Example:
        >>> run = configure(Run(), steps=40, eval_every=10)
        >>> differences({"steps": (20, 40)}, run, 20)
        ()
        >>> differences({"steps": (20, 40)}, configure(run, eval_every=0), 20)
        ('one run would not have evaluated after step 20',)
    """
    lines = (_rates(changes, run, step), _ahead(changes, run, step), _evaluated(changes, run, step))
    return tuple(line for line in (*lines, *_sampled(changes, run, step)) if line is not None)


def _rates(changes: Changes, run: Run, step: int) -> str | None:
    """Whether the learning rates of the steps done depend on the number of steps."""
    if "steps" not in changes or changes.keys() & {"schedule", "optimizer"}:
        return None
    before = configure(run, steps=changes["steps"][0])
    updates = [(done, update) for done in range(step) for update in range(run.trainer.updates)]
    if all(learning_rate(before, *update) == learning_rate(run, *update) for update in updates):
        return None
    schedule = flat_json(run)["schedule"]
    return (
        f"schedule {schedule} counts on all steps: until here the learning rates were those of {before.trainer.steps}"
    )


def _ahead(changes: Changes, run: Run, step: int) -> str | None:
    """Whether rollouts of the next steps would have been sampled already."""
    planned = changes.get("steps", (run.trainer.steps,))[0]
    last = min(step + run.rollout.async_steps, run.trainer.steps)
    if last <= planned:
        return None
    steps = f"step {last}" if last == planned + 1 else f"steps {planned + 1} to {last}"
    return f"one run would have sampled the rollouts of {steps} ahead, with older weights"


def _evaluated(changes: Changes, run: Run, step: int) -> str | None:
    """Whether the evaluation at the end that was planned is one more."""
    every, ended = run.evaluation.every, "steps" in changes and step == changes["steps"][0] > 0
    if not ended or not run.evaluation.problems or (every and step % every == 0) or step == run.trainer.steps:
        return None
    return f"one run would not have evaluated after step {step}"


def _sampled(changes: Changes, run: Run, step: int) -> list[str]:
    """What other sampling does to evaluations, and to rollouts that were sampled ahead."""
    lines = []
    if run.evaluation.problems and changes.keys() & set(OF_A_COMPLETION):
        lines.append(f"evaluations after step {step} are sampled so too, and do not compare with those before")
    if run.rollout.async_steps and any(map(_of_sampling, changes)):
        lines.append(f"rollouts that were sampled ahead of step {step} are sampled again")
    return lines
