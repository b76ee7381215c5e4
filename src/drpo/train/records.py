"""Reads and checks the records of a run (JSON lines), and computes their checksums."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from drpo.errors import InputError, as_typed
from drpo.train.fields import FIELDS
from drpo.train.rollout_record import fault

METRICS, ROLLOUTS, EVALUATIONS, TIMING = "metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl", "timing.jsonl"
FILES = (METRICS, ROLLOUTS, EVALUATIONS, TIMING)
CONFIG, ENVIRONMENT, SUMMARY = "config.json", "environment.json", "summary.json"
STALLED = "stalled.txt"
"""The stacks of a process that hung."""
CHECKPOINTS, MODEL = "checkpoints", "model"
SFT = "sft"
"""The `kind` in config.json of a run of supervised fine-tuning."""
TRIALS, RESULTS = "trials", "results.json"
"""A comparison's folder of runs, and the file of its results."""
_OLD_TRIALS, _READS_OLD = "cells", "commit e0b217a of the repository"
"""The name of that folder in earlier versions, and the version that reads it."""
_OLD_FIELDS = {
    "marking": ("reward_pool", "commit 6ad2188 of the repository"),
    "lag": ("async_steps", _READS_OLD),
    "async_steps": ("rollout.async_steps", "commit ae41b84 of the repository"),
}
"""A field that every config.json of an earlier version has -> its name since, and the version that reads the folder."""
_SFT_FIELDS = {"task": "data.path", "objective": "kind", "eval_problems": "data.holdout"}
"""Where supervised fine-tuning has the fields that a run of `drpo train` has elsewhere."""
_TEXTS = ("text", "prompt", "finish_reason")
"""Fields of a completion that are text."""
_BLOCK = 2**20
_ZEROS_FOR_DIGITS = bytes(48 if 48 <= byte < 58 else 32 for byte in range(256))
_LONG_NUMBER = re.compile(rb"(?<![0-9.])[0-9]{19}")


@dataclass(frozen=True)
class Evaluation:
    """How well the policy does on held-out problems.

    Args:
        step: rollouts trained on before it.
        reward_mean: avg@k: the mean over problems of the mean score of k samples, in the reward's units.
        low, high: 95 % interval of the mean, `mean_interval`; nan where a score leaves [0, 1].
        pass_at: k -> unbiased pass@k for k = 1, 2, 4, ... up to the samples.
        n_problems: problems with at least one scored completion.
        n_samples: completions drawn per problem.
        mean_length: tokens.
        truncated: share of completions cut at max_new_tokens.
        failed: completions whose reward failed or abstained; they count nowhere, or as 0 where
            `RewardConfig.on_failure` is zero and the reward failed.
        reward_parts: name of a part of the reward -> its mean over the completions that have it.
        problem_means: problem id -> mean score of its samples, of the `n_problems`.
        difference: mean over problems of the score now minus that at step 0, of the problems that both have; None at
            step 0, and where that evaluation is not known.
        difference_low, difference_high: its 95 % interval, `difference_interval`; None where it has none.
    """

    step: int
    reward_mean: float
    low: float
    high: float
    pass_at: dict[int, float]
    n_problems: int
    n_samples: int
    mean_length: float
    truncated: float
    failed: int
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    problem_means: Mapping[str, float] = field(default_factory=dict)
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None


class Written(TypedDict):
    """How much of a file was written, and its SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class RunFields:
    """The fields of config.json that are read without building the run; objects are specs."""

    name: str
    model: str
    task: str
    objective: str
    optimizer: str
    seed: int
    steps: int
    eval_problems: int


class Sum:
    """Length and SHA-256 of the beginning of a file; extended as the file grows, without reading it again.

    Attributes:
        bytes: length of what has been hashed.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._hash = hashlib.sha256()

    def plus(self, data: bytes) -> "Sum":
        """Return the sum of the same bytes followed by `data`."""
        new = Sum()
        new.bytes, new._hash = self.bytes + len(data), self._hash.copy()
        new._hash.update(data)
        return new

    def read(self, path: Path, upto: int | None = None) -> "Sum":
        """Hash the bytes of a file after those hashed so far, up to `upto` in all; return self."""
        with path.open("rb") as file:
            file.seek(self.bytes)
            while block := file.read(_BLOCK if upto is None else min(_BLOCK, upto - self.bytes)):
                self._hash.update(block)
                self.bytes += len(block)
        return self

    def record(self) -> Written:
        """Return the sum as a checkpoint stores it.

        Example:
            >>> Sum().plus(b"abc").record()["bytes"]
            3
        """
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}


def read_written(path: Path, written: Written) -> Sum:
    """Check that a file still begins with what was written before a checkpoint; return that part's sum.

    Args:
        path: of the file.
        written: from `Sum.record`.

    Raises:
        InputError: the file is gone, was cut, or says something else.
    """
    wanted = written["bytes"]
    if not path.is_file() and wanted:
        raise InputError(f"{path}: missing; {wanted:,} bytes of it were written before the last checkpoint")
    actual = Sum().read(path, wanted) if wanted else Sum()
    if actual.bytes < wanted:
        raise InputError(
            f"{path}: cut, it has {actual.bytes:,} of the {wanted:,} bytes that were written before the last checkpoint"
        )
    if actual.record() != written:
        raise InputError(f"{path}: changed, its first {wanted:,} bytes are not those that were written (SHA-256)")
    return actual


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says; NaN and infinities are numbers here, as in metrics.

    msgspec reads it where it can, six times as fast as `json`; it lets whole numbers beyond 64 bits pass, and refuses
    NaN and half a surrogate pair.

    Raises:
        ValueError: it is not text or not JSON, is nested too deeply, or has a whole number beyond 64 bits.
    """
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if b"0" * 19 not in data.translate(_ZEROS_FOR_DIGITS) or not _LONG_NUMBER.search(data):  # the first is the quicker
        with suppress(msgspec.DecodeError, UnicodeError, RecursionError):
            return msgspec.json.decode(data)
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole(digits: str) -> int:
    """Return a whole number that fits 64 bits."""
    if len(digits) > 20 or abs(int(digits)) >= 2**63:
        raise ValueError(f"{digits[:20]}... is too large a number")
    return int(digits)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        FileNotFoundError: it is not there.
        InputError: it cannot be read, or holds something else.
    """
    try:
        record = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} holds a {type(record).__name__}, not an object with named fields")
    return record


def is_run(folder: str | Path) -> bool:
    """Return whether a folder is that of a run, of RL or of supervised fine-tuning, that has recorded a step."""
    return Path(folder, METRICS).exists()


def is_sft(folder: Path) -> bool:
    """Return whether a folder is that of a run of supervised fine-tuning.

    Args:
        folder: any; a configuration that cannot be read is another command's to refuse.
    """
    try:
        return read_json(folder / CONFIG).get("kind") == SFT
    except (OSError, InputError):
        return False


def run_fields(config: Mapping[str, Any]) -> RunFields:
    """Return the fields of a run's config.json that are read without building the run.

    Raises:
        InputError: a field is missing or of another type; the message names it.
    """
    paths = {**FIELDS, **(_SFT_FIELDS if config.get("kind") == SFT else {})}
    values: dict[str, Any] = {}
    for name in RunFields.__dataclass_fields__:
        value: Any = config
        for part in paths[name].split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise InputError(f"{paths[name]} is missing")
            value = value[part]
        values[name] = value
    try:
        return msgspec.convert(values, RunFields)
    except (msgspec.ValidationError, UnicodeError) as error:  # half a surrogate pair
        raise InputError(str(error).replace("`", "")) from None


def refuse_old_run(folder: Path) -> None:
    """Raise if an earlier version wrote a run: its configuration and its records have other names.

    Args:
        folder: of the run; its config.json may be missing or damaged.

    Raises:
        InputError: it did; the message names the version that reads the folder.
    """
    try:
        config = read_json(folder / CONFIG)
    except (FileNotFoundError, InputError):
        return
    for old, (new, version) in _OLD_FIELDS.items():
        if old in config:
            raise InputError(f"{folder / CONFIG}: of an earlier version ('{old}', now '{new}'); {version} reads it")


def refuse_old_comparison(path: Path, names: Collection[str]) -> None:
    """Raise if a comparison has its trials under their old name.

    Args:
        path: of its folder, or of its results.json.
        names: of the files there, or of the fields.

    Raises:
        InputError: it has.
    """
    if _OLD_TRIALS in names and TRIALS not in names:
        raise InputError(f"{path}: of an earlier version ('{_OLD_TRIALS}', now '{TRIALS}'); {_READS_OLD} reads it")


def refuse_part(folder: Path) -> None:
    """Raise if a folder is the model or a checkpoint of a run, in place of the run's own.

    Raises:
        InputError: as above; the message names the run's folder.
    """
    run = folder.parents[1] if folder.parent.name == CHECKPOINTS else folder.parent
    if (folder.name in (MODEL, CHECKPOINTS) or folder.parent.name == CHECKPOINTS) and (run / CONFIG).is_file():
        raise InputError(f"{folder}: a part of a run; name the run's own folder, {run}")


def read_config(folder: Path) -> dict[str, Any]:
    """Return what config.json of a run says.

    Raises:
        InputError: there is no run, it cannot be read, or an earlier version wrote it.
    """
    refuse_part(folder)
    try:
        config = read_json(folder / CONFIG)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder}: no run there ({CONFIG} is missing); `drpo train RECIPE --out {as_typed(folder)}` begins one"
        ) from None
    refuse_old_run(folder)
    return config


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each whole line of a JSON-lines file, and its record; a last line cut short by a crash is left out.

    Raises:
        InputError: a line is no record of a step, or has text where a number belongs.
    """
    with path.open("rb") as lines:  # as bytes, since the cut may go through a letter
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                text, record = read_line(line, f"{path} line {number}")
                require_types(path.name, record, f"{path} line {number}")
                yield text, record


def read_line(line: bytes, where: str) -> tuple[str, dict[str, Any]]:
    """Return a line of a JSON-lines file as text, and its record.

    Raises:
        InputError: it is no record of a step; the message begins with `where`.
    """
    try:
        text = line.decode("utf-8")
        record = parse_json(text)
    except ValueError as error:
        raise InputError(f"{where} cannot be read: {error}") from None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise InputError(f"{where} is not a record with a step, a whole number")
    return text, record


def require_types(file: str, record: Mapping[str, Any], where: str) -> None:
    """Raise if a figure or a completion's reward is not a number, its text not text, or its tokens do not fit.

    Args:
        file: name of the file of records.
        record: of it.
        where: it stands, for the message.

    Raises:
        InputError: something is of another type, or does not fit together.
    """
    if file in (METRICS, EVALUATIONS, TIMING):
        wrong = next((name for name, value in record.items() if not _is_figure(name, value)), None)
    elif file == ROLLOUTS:
        wrong = next((name for name in _TEXTS if not isinstance(record.get(name, ""), str)), None)
        wrong = wrong or ("reward" if not _is_number(record.get("reward")) else None)
        if wrong is None and (said := fault(record)) is not None:
            raise InputError(f"{where}: {said if len(said) < 200 else said[:197] + '...'}")
    else:
        return
    if wrong is not None:
        shown = repr(record[wrong])
        raise InputError(f"{where}: {wrong} is {shown if len(shown) < 60 else shown[:57] + '...'}, of the wrong type")


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _is_figure(name: str, value: Any) -> bool:
    match name, value:
        case "pass_at" | "reward_parts" | "problem_means", dict():
            return all(map(_is_number, value.values()))
        case "updates", list():
            return all(isinstance(one, dict) and all(map(_is_number, one.values())) for one in value)
    return name not in ("pass_at", "reward_parts", "problem_means", "updates") and _is_number(value)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file, none where it does not exist."""
    return [record for _, record in read_lines(path)] if path.exists() else []
