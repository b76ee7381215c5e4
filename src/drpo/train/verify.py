"""Checks a run's files: their checksums, and whether the records agree with one another. Imports no torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from drpo.errors import InputError, counted, one_line
from drpo.train.chapters import CHAPTERS, described, read_chapters
from drpo.train.curriculum import measured_from
from drpo.train.ending import recorded_reason
from drpo.train.origin import START, read_origin
from drpo.train.records import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    EVALUATIONS,
    FILES,
    METRICS,
    MODEL,
    ROLLOUTS,
    SUMMARY,
    parse_json,
    read_json,
    read_lines,
    read_records,
    read_written,
    refuse_old_run,
    run_fields,
)
from drpo.train.stored import (
    CURRICULUM,
    SHA256SUMS,
    Progress,
    complete,
    latest,
    named,
    read_curriculum,
    read_state,
    require_sound,
    step_of,
    sum_of,
)
from drpo.train.warmed import ANSWERS, WARM_UP, is_warm, read_tally


@dataclass(frozen=True)
class Part:
    """The result of checking one part of a run.

    Args:
        name: of the file or folder, within the run's folder.
        sound: False if something is wrong with it.
        message: the result in one line.
    """

    name: str
    sound: bool
    message: str


def verify(folder: Path, say: Callable[[str], None] = lambda name: None) -> Iterator[Part]:
    """Yield the result of each check, for every part of a run that is there or should be.

    Args:
        folder: of the run.
        say: receives the name of the part that is read next.

    Raises:
        InputError: an earlier version wrote the run.
    """
    refuse_old_run(folder)
    checks: list[tuple[str, Callable[[], str | None]]] = [
        (CONFIG, partial(_config, folder)),
        (CHAPTERS, partial(_chapters, folder)),
        (ENVIRONMENT, partial(_environment, folder)),
        *((file, partial(_records, folder, file)) for file in FILES),
        *((f"{CHECKPOINTS}/{c.name}", partial(_checkpoint, c)) for c in named(folder / CHECKPOINTS)),
        (CURRICULUM, partial(_curriculum, folder)),
        (WARM_UP, partial(_warm_up, folder)),
        (START, partial(_start, folder)),
        (MODEL, partial(_model, folder)),
        (SUMMARY, partial(_summary, folder)),
    ]
    for name, check in checks:
        say(name)
        try:
            message = check()
        except FileNotFoundError:
            yield Part(name, False, "missing")
        except (InputError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            yield Part(name, False, str(error).removeprefix(f"{folder / name}").lstrip(": ") or type(error).__name__)
        else:
            if message is not None:
                yield Part(name, True, message)


def is_finished(folder: Path) -> bool:
    """Whether a run's summary says that it finished; a run killed after its last step has no such summary.

    Args:
        folder: of the run.
    """
    try:
        return bool(read_json(folder / SUMMARY).get("finished"))
    except (FileNotFoundError, InputError):  # `verify` reports the summary separately
        return False


def holds_final_model(folder: Path, steps: int) -> bool:
    """Whether a run's model is that of its last step; one that was lengthened keeps the earlier one until its end.

    Args:
        folder: of the run.
        steps: of its configuration.
    """
    if not (folder / MODEL).is_dir():
        return False
    return is_finished(folder) or max((m["step"] for m in read_records(folder / METRICS)), default=0) >= steps


def _config(folder: Path) -> str:
    config = run_fields(read_json(folder / CONFIG))
    return f"{config.model}, {config.objective}, {counted(config.steps, 'step')}"


def _chapters(folder: Path) -> str | None:
    chapters = read_chapters(folder)
    steps = [chapter.step for chapter in chapters]
    if steps != sorted(set(steps)):
        raise InputError("its steps do not rise")
    return "; ".join(map(described, chapters)) or None


def _environment(folder: Path) -> str:
    versions = read_json(folder / ENVIRONMENT).get("versions", {})
    return ", ".join(f"{name} {versions[name]}" for name in ("drpo", "torch") if versions.get(name)) or "readable"


def _last_state(folder: Path) -> tuple[str, Progress] | None:
    """Return the name and the progress of the newest checkpoint that can be read; None without one."""
    for checkpoint in reversed(complete(folder / CHECKPOINTS)):
        try:
            return checkpoint.name, read_state(checkpoint)[0]
        except InputError:
            continue
    return None


def _records(folder: Path, file: str) -> str | None:
    path, last = folder / file, _last_state(folder)
    written = last[1].records.get(file) if last else None
    if written is not None:
        read_written(path, written)
    if not path.exists():
        return None
    steps = [record["step"] for _, record in read_lines(path)]
    if steps != sorted(steps):
        raise InputError("its steps do not rise")
    if file == METRICS and steps != list(range(1, len(steps) + 1)):
        missing = next(i for i, step in enumerate(steps, 1) if step != i)
        raise InputError(f"step {missing} is missing, or recorded twice")
    if file == EVALUATIONS:
        _require_evaluations(folder, steps)
    if last is None:
        return f"{len(steps):,} lines; no checkpoint says what was written"
    if written is None:
        return f"{len(steps):,} lines; no sum, {last[0]} is of an earlier version"
    return f"{len(steps):,} lines; those before {last[0]} are as they were written"


def _require_evaluations(folder: Path, steps: list[int]) -> None:
    config = run_fields(read_json(folder / CONFIG))
    if len(set(steps)) < len(steps):
        raise InputError("a step is recorded twice")
    if config.eval_problems and is_finished(folder):
        missing = {0, config.steps} - set(steps)
        if missing:
            raise InputError(f"the evaluation after {counted(min(missing), 'step')} is missing")
    for record in read_records(folder / EVALUATIONS):
        low, mean, high = (record.get(name) for name in ("low", "reward_mean", "high"))
        if mean is None or low is None or high is None or not math.isfinite(low):
            continue
        if not low - 1e-9 <= mean <= high + 1e-9:
            raise InputError(f"step {record['step']}: reward_mean {mean} lies outside its interval")


def _checkpoint(checkpoint: Path) -> str:
    require_sound(checkpoint)
    sums = read_state(checkpoint)[2]
    return f"{len(sums)} files as they were written" if sums else "no sums, of an earlier version"


def _curriculum(folder: Path) -> str | None:
    """Compare the pass rates that the newest checkpoint has with those of rollouts.jsonl."""
    last = latest(folder / CHECKPOINTS)
    state = None if last is None else read_curriculum(last)
    if last is None or state is None:
        return None
    steps = range(state.begun + 1, step_of(last) + 1)
    records = (record for _, record in read_lines(folder / ROLLOUTS))
    counted_ones = [
        {name: record.get(name, ()) for name in ("step", "problem", "reward", "earlier")}
        for record in records
        if record["step"] in steps
    ]
    if missing := len({*steps} - {record["step"] for record in counted_ones}):
        return f"not compared: {ROLLOUTS} lacks {counted(missing, 'step')} that it counts"
    recorded = measured_from(counted_ones)
    known = {name: problem.means for name, problem in state.problems.items()}
    wrong = next((name for name in {**recorded, **known} if recorded.get(name, ()) != known.get(name, ())), None)
    if wrong is not None:
        raise InputError(f"the pass rate of problem {wrong} in {last.name} is not that of {ROLLOUTS}")
    return f"{counted(len(recorded), 'problem')}; their pass rates in {last.name} are those of {ROLLOUTS}"


def _model(folder: Path) -> str | None:
    model = folder / MODEL
    if not model.is_dir():
        # A comparison's trials leave neither a model nor checkpoints.
        if is_finished(folder) and complete(folder / CHECKPOINTS):
            raise InputError("missing, though the run is finished; drpo train --resume writes it again")
        return None
    if not (model / SHA256SUMS).exists():
        for path in sorted(model.glob("*.safetensors")):
            _require_whole(path)
        return "no sums, of an earlier version or half written; its tensors have the length that they should"
    return _summed(model)


def _start(folder: Path) -> str | None:
    origin = read_origin(folder)
    if origin is None:
        return None
    return f"{_summed(folder / START)}; the weights of {one_line(origin.run)} after {counted(origin.step, 'step')}"


def _warm_up(folder: Path) -> str | None:
    """Compare the answers of a warm-up, and the model that it left, with their sums."""
    tally = read_tally(folder)
    if tally is None:
        return None
    if tally.written is not None:
        read_written(folder / WARM_UP / ANSWERS, tally.written)
    if not is_warm(folder):
        return f"not done; {tally}"
    return f"{_summed(folder / WARM_UP / MODEL)}; {tally}"


def _summed(model: Path) -> str:
    """Compare the files of a model's folder with their sums."""
    lines = [line.split("  ", 1) for line in (model / SHA256SUMS).read_text().splitlines()]
    for wanted, name in lines:
        if sum_of(model / name) != wanted:
            raise InputError(f"{name} is not what was written (SHA-256)")
    return f"{len(lines)} files as they were written"


def _require_whole(path: Path) -> None:
    """Raise unless a safetensors file is as long as its header says: 8 bytes, the header, the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise InputError(f"{path.name} is no safetensors file, or cut")
        header: dict[str, Any] = parse_json(file.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise InputError(f"{path.name} is cut, or too long")


def _summary(folder: Path) -> str | None:
    if not (folder / SUMMARY).exists():
        return None
    summary, recorded = read_json(folder / SUMMARY), len(read_records(folder / METRICS))
    if summary["steps"] > recorded:
        raise InputError(f"says {counted(summary['steps'], 'step')}, {METRICS} has {recorded}")
    if summary["finished"] and recorded < run_fields(read_json(folder / CONFIG)).steps:
        raise InputError(f"says that the run is finished, {METRICS} has {counted(recorded, 'step')}")
    done, reason = counted(summary["steps"], "step"), recorded_reason(folder)
    return f"{done}, {'finished' if summary['finished'] else 'not finished'}{f': {reason}' if reason else ''}"
