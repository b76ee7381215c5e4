"""Writes the files of a run: JSON lines, equal byte for byte if the run is repeated, and timings in their own file."""

import json
import mmap
import os
import platform
import resource
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drpo.credentials import without_password
from drpo.errors import InputError
from drpo.files import naming, opened_here, truncate, write_text
from drpo.train.records import (
    FILES,
    Sum,
    Written,
    read_line,
    read_written,
)
from drpo.types import (
    Batch,
    Episode,
    Failure,
    Generation,
    Played,
    RewardResult,
    Routes,
    Sampling,
    ScoredGroup,
    StepStats,
    TokenSequence,
    TopK,
)

_LIBRARIES = (
    "drpo",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "peft",
    "safetensors",
    "reasoning-gym",
    "math-verify",
)


class RunLog:
    """The JSON-lines files of a run; every line has a "step".

    Args:
        folder: of the run.
        writes: False for a process that is not the run's first, which leaves the files alone.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder = folder
        self._files = FILES if writes else ()
        self._written: dict[str, Sum] = {}

    def write(self, file: str, *records: Mapping[str, Any]) -> None:
        """Append records, one line each, all or none, and hand them to the operating system.

        Raises:
            InputError: the file is no longer what was written to it.
        """
        if file not in self._files:
            return
        path, known = self.folder / file, self._sum(file)
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        data = text.encode("utf-8", "replace")  # half a surrogate pair, as broken output may have
        left, both = memoryview(data), known.plus(data)
        with naming(path), open(path, "ab", buffering=0, opener=opened_here) as out:
            before = out.tell()
            if before != known.bytes:
                raise InputError(
                    f"{path}: something else removed, cut or wrote it while the run was at it "
                    f"({before:,} bytes, where {known.bytes:,} were written)"
                )
            try:
                while left:
                    left = left[out.write(left) :]
                self._written[file] = both
            except BaseException:
                out.truncate(before)
                self._written[file] = known
                raise

    def _sum(self, file: str) -> Sum:
        if file not in self._written:
            path = self.folder / file
            self._written[file] = Sum().read(path) if path.exists() else Sum()
        return self._written[file]

    def written(self) -> dict[str, Written]:
        """Return each file's length and SHA-256, for a checkpoint."""
        return {file: self._sum(file).record() for file in self._files}

    def require(self, written: Mapping[str, Written]) -> None:
        """Compare the files with what a checkpoint says was written before it.

        Raises:
            InputError: one is gone, was cut, or says something else.
        """
        for file in self._files:
            if file in written:
                self._written[file] = read_written(self.folder / file, written[file])

    def sync(self) -> None:
        """Force everything written to the disk; called before a checkpoint that counts on it."""
        for path in (self.folder / file for file in self._files):
            if path.exists():
                with naming(path), open(path, "rb+", opener=opened_here) as out:
                    os.fsync(out.fileno())

    def rewind(self, step: int) -> None:
        """Forget what a run wrote past the checkpoint after `step` steps, including a line that a crash cut short.

        Raises:
            InputError: one of the files cannot be read; then none is changed.
        """
        ends = {}
        for file in self._files:
            path = self.folder / file
            if os.path.lexists(path):
                with naming(path), open(path, "rb+", opener=opened_here):
                    ends[file] = _end_of(path, step) if path.stat().st_size else 0
        for file, end in ends.items():
            truncate(self.folder / file, end)
            known = self._written.pop(file, Sum())  # what `require` has read is not read again
            self._written[file] = (known if known.bytes <= end else Sum()).read(self.folder / file)


def _end_of(path: Path, step: int) -> int:
    """Return the length of a file up to its last whole record of a step that is done; steps never fall."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n") + 1
        while end:
            start = text.rfind(b"\n", 0, end - 1) + 1
            if read_line(text[start:end], f"{path} at byte {start}")[1]["step"] <= step:
                break
            end = start
        return end


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file so that a crash leaves the old one or the new one."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text.encode("utf-8", "backslashreplace").decode())  # half a surrogate pair, as JSON escapes it


Trained = Mapping[TokenSequence, Mapping[str, Any]]
"""What an optimiser update saw of each of its sequences, as `trained_records` writes it."""


def trained_records(batches: Sequence[Batch], stats: Sequence[StepStats]) -> Trained:
    """Return, for each sequence that took part in an update, what it takes to ask any objective about it.

    "update" counts a step's updates from 0; "advantage", and "advantages" where its tokens have different ones, of
    which the former is the mean; "logp", the policy's before that update, and "divergence", "proximal_logp" and
    "reference_logp", where the objective reads one: a number for each token. One that was skipped, because its
    gradient is 0, has none.

    Args:
        batches: of a step's updates, in order.
        stats: of each.
    """
    records: dict[TokenSequence, dict[str, Any]] = {}
    for i, (batch, seen) in enumerate(zip(batches, stats, strict=True)):
        for credit in batch.credits:
            records[credit.sequence] = {"update": i, **advantage_record(credit.advantage)}
        if not seen.taken:  # nothing was trained, and what the policy said is no number
            continue
        order = seen.row.argsort(stable=True)
        trained, counts = seen.row.unique(return_counts=True)
        for name in ("logp", "divergence", "proximal_logp", "reference_logp"):
            column = getattr(seen.tokens, name)
            if column is not None:
                parts = column[order].split(counts.tolist())
                for n, part in zip(trained.tolist(), parts, strict=True):
                    records[batch.credits[n].sequence][name] = decimals(part)
    return records


def advantage_record(advantage: Tensor) -> dict[str, Any]:
    """The mean of a completion's advantages [N], and all of them where they differ."""
    mean = decimals(advantage.double().mean().float().reshape(1))[0]
    return {"advantage": mean} | ({"advantages": decimals(advantage)} if (advantage != advantage[0]).any() else {})


def decimals(values: Tensor) -> list[float]:
    """The shortest decimals that give the same float32 back."""
    return [float(str(x)) for x in values.numpy()]


def rollout_records(step: int, groups: Sequence[ScoredGroup], trained: Trained) -> Iterator[dict[str, Any]]:
    """Yield one record per episode of a rollout: all that it takes to read it, or to train on it again.

    Args:
        step: counted from 1.
        groups: of the rollout.
        trained: from `trained_records`.
    """
    for group in groups:
        failures = {u.episode: u.failure for u in (*group.unscored, *group.scored_zero)}
        results: dict[Episode, RewardResult] = dict(zip(group.episodes, group.results, strict=True))
        rewards: dict[Episode, float] = dict(zip(group.episodes, group.rewards.tolist(), strict=True))
        for episode in sorted(group.all_episodes, key=lambda e: e.sample):
            failure = failures.get(episode)
            yield {
                "step": step,
                "prompt": episode.prompt,
                "answer": group.problem.answer,
                "reward": rewards.get(episode),
                "failure": None if failure is None else failure.text,
                **_reward_record(results.get(episode)),
                **_episode_record(episode, trained),
            }


def _reward_record(result: RewardResult | None) -> dict[str, Any]:
    """Return the parts of a reward and its rewards of turns; empty without any."""
    if result is None:
        return {}
    parts = {"reward_parts": dict(result.parts)} if result.parts else {}
    turns = {"reward_turns": list(result.turns)} if result.turns else {}
    return parts | turns | ({"reward_penalties": list(result.penalties)} if result.penalties else {})


def _episode_record(episode: Episode, trained: Trained) -> dict[str, Any]:
    """An episode, and what an update saw of it: of its first sequence; of further ones within "branches"."""
    first, *branches = [_sequence_record(s) | dict(trained.get(s, {})) for s in episode.sequences] or [{}]
    played = episode.played
    return {
        "problem": episode.problem_id,
        "sample": episode.sample,
        **({"attempt": episode.attempt} if episode.attempt else {}),
        **({"earlier": list(episode.earlier)} if episode.earlier else {}),
        "text": episode.text,
        "finish_reason": episode.finish_reason,
        **({"version": episode.version} if episode.sequences else {}),
        **first,
        **({"branches": branches} if branches else {}),
        **({} if played is None else {"messages": [dict(m) for m in episode.messages], **_played_record(episode)}),
    }


def _sequence_record(sequence: TokenSequence) -> dict[str, Any]:
    """Its ids, and what is known of those that were sampled: all of them, unless "sampled" says which."""
    whole = bool(sequence.sampled.all())
    return {
        "prompt_ids": sequence.prompt_ids.tolist(),
        "token_ids": sequence.token_ids.tolist(),
        **({} if whole else {"sampled": _spans(sequence.sampled)}),
        "behavior_logp": decimals(sequence.behavior_logp),
    }


def _spans(sampled: Tensor) -> list[list[int]]:
    """The first position of each run of sampled tokens, and the one behind it.

    Example:
        >>> _spans(torch.tensor([True, True, False, True]))
        [[0, 2], [3, 4]]
    """
    padded = torch.nn.functional.pad(sampled.int(), (1, 1))
    edges = padded.diff().nonzero().flatten().tolist()
    return [list(span) for span in zip(edges[::2], edges[1::2], strict=True)]


def _played_record(episode: Episode) -> dict[str, Any]:
    assert episode.played is not None
    played = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(episode.played).items()}
    return {"turns": list(episode.turns), "played": played}


def in_flight_record(episode: Episode) -> dict[str, Any]:
    """Return all of an episode that `episode_of` needs, as plain JSON values."""
    record = _episode_record(episode, {}) | {"prompt": episode.prompt, "messages": [dict(m) for m in episode.messages]}
    tops = [s.top_logprobs for s in episode.sequences]
    record |= {"tops": [None if top is None else [top.ids.tolist(), top.logp.tolist()] for top in tops]}
    routes = [s.routes for s in episode.sequences]
    if any(r is not None for r in routes):
        record["routes"] = [None if r is None else _routes_record(r) for r in routes]
    return record


def _routes_record(routes: Routes) -> dict[str, Any]:
    """The dtype, layers and experts to a token, and the bytes of both tensors in base64."""
    shape = {"dtype": str(routes.tokens.dtype).removeprefix("torch."), "shape": list(routes.tokens.shape[1:])}
    return shape | {n: b64encode(x.numpy().tobytes()).decode() for n, x in vars(routes).items()}


def _routes_of(record: Mapping[str, Any]) -> Routes:
    dtype = {"uint8": torch.uint8, "int16": torch.int16}[record["dtype"]]
    both = [torch.frombuffer(bytearray(b64decode(record[n])), dtype=dtype) for n in ("prompt", "tokens")]
    return Routes(*(x.view(-1, *record["shape"]) for x in both))


def episode_of(record: Mapping[str, Any], sampling: Sampling) -> Episode:
    """Return the episode of an `in_flight_record`, to the bit.

    Raises:
        KeyError, ValueError, TypeError, InputError: it is not such a record.
    """
    sequences = [record, *record.get("branches", ())] if "token_ids" in record else []
    played = record.get("played")
    return Episode(
        problem_id=record["problem"],
        sample=record["sample"],
        messages=tuple(record["messages"]),
        prompt=record["prompt"],
        text=record["text"],
        finish_reason=record["finish_reason"],
        sampling=sampling,
        turns=tuple(record.get("turns", (len(record.get("behavior_logp", ())),))),
        sequences=tuple(
            replace(sequence_of(of_one, record["version"], top), routes=route and _routes_of(route))
            for of_one, top, route in zip(
                sequences, record["tops"], record.get("routes", [None] * len(sequences)), strict=True
            )
        ),
        played=None if played is None else _played_of(played),
        attempt=record.get("attempt", 0),
        earlier=tuple(record.get("earlier", ())),
    )


def _played_of(record: Mapping[str, Any]) -> Played:
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
    return Played(**given | {"failure": record["failure"] and Failure(**record["failure"])})


def sequence_of(record: Mapping[str, Any], version: int, top: Sequence[Any] | None = None) -> TokenSequence:
    """Return the token sequence of a record of rollouts.jsonl, or of one of its branches.

    Args:
        record: of the sequence.
        version: of the weights that sampled it.
        top: ids and log-probabilities of the sampler's most probable tokens, or None.
    """
    token_ids = torch.tensor(record["token_ids"])
    sampled = torch.zeros_like(token_ids, dtype=torch.bool)
    for start, end in record.get("sampled", [[0, len(token_ids)]]):
        sampled[start:end] = True
    generation = Generation(  # which checks what the model sampled
        token_ids=token_ids[sampled],
        behavior_logp=torch.tensor(record["behavior_logp"], dtype=torch.float32),
        finish_reason="stop",
        version=version,
        top_logprobs=None if top is None else TopK(torch.tensor(top[0]), torch.tensor(top[1], dtype=torch.float32)),
    )
    sequence = TokenSequence.of(torch.tensor(record["prompt_ids"]), generation)
    return replace(sequence, token_ids=token_ids, sampled=sampled)


class Clock:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add what happens inside to a phase's seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def environment() -> dict[str, Any]:
    """Return the versions and the hardware that a run depends on."""
    return {
        "command": [without_password(word) for word in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": _accelerator(),
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def _accelerator() -> str | None:
    """The name of the GPU that torch finds, whether the run uses it or not; None without one."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return "Apple MPS" if torch.backends.mps.is_available() else None


def peak_memory() -> int:
    """Return the most memory this process has held, in bytes: on the accelerator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
