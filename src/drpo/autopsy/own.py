"""drpo's own format, as JSON lines or parquet: the fields of `rollouts.jsonl`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from drpo.autopsy.dumped import Column, Dumped, Format, joined
from drpo.autopsy.lines import Floats, Ints, read_lines
from drpo.autopsy.parquet import read_rows, require_whole
from drpo.errors import InputError


class _Tokens(msgspec.Struct):
    token_ids: Ints | None = None
    sampled: list[tuple[int, int]] | None = None
    behavior_logp: Floats | None = None
    logp: Floats | None = None
    entropy: Floats | None = None
    advantage: float | None = None
    advantages: Floats | None = None


class _Row(_Tokens, kw_only=True):
    step: int
    problem: str | int
    prompt: str = ""
    text: str = ""
    answer: str = ""
    reward: float | None = None
    reward_parts: dict[str, float] = {}
    failure: str | None = None
    finish_reason: str | None = None
    update: int = 0
    held_out: bool = False
    branches: list[_Tokens] = []


FIELDS = frozenset(_Row.__struct_fields__)
"""Of a record."""


def read_jsonl(path: Path) -> Iterator[Dumped]:
    """Yield the rollouts of a file of JSON lines."""
    for where, row in read_lines(path, _Row):
        yield _rollout(where, row)


def read_parquet(path: Path) -> Iterator[Dumped]:
    """Yield the rollouts of a parquet file with columns of the same names.

    Raises:
        InputError: a value of another type.
    """
    names = [name for name in _Row.__struct_fields__ if name not in ("branches", "sampled")]
    for where, values in read_rows(path, names):
        arrays = {name: v for name, v in values.items() if isinstance(v, np.ndarray)}
        plain = {name: v for name, v in values.items() if v is not None and name not in arrays}
        try:
            row = msgspec.convert(plain, _Row)
        except msgspec.ValidationError as error:
            raise InputError(f"{where}: {str(error).replace('`', '').replace('$.', '')}") from None
        require_whole(arrays.get("token_ids"), where)
        for name, column in arrays.items():
            setattr(row, name, column)
        yield _rollout(where, row)


def _rollout(where: str, row: _Row) -> Dumped:
    parts = [row, *row.branches]
    ids = joined([_sampled_ids(part, where) for part in parts])
    return Dumped(
        step=row.step,
        group=str(row.problem),
        reward=row.reward,
        length=len(row.text) if ids is None else len(ids),
        prompt=row.prompt,
        text=row.text,
        answer=row.answer,
        parts=row.reward_parts,
        failure=row.failure,
        cut=None if row.finish_reason is None else row.finish_reason == "length",
        held_out=row.held_out,
        update=row.update,
        token_ids=ids,
        behavior_logp=joined([part.behavior_logp for part in parts]),
        logp=joined([part.logp for part in parts]),
        entropy=joined([part.entropy for part in parts]),
        advantages=joined([_advantages(part, where, spread=len(parts) > 1) for part in parts]),
    )


def _sampled_ids(part: _Tokens, where: str) -> Column | None:
    ids = part.token_ids
    if ids is None or part.sampled is None:
        return ids
    if not all(0 <= first <= behind <= len(ids) for first, behind in part.sampled):
        raise InputError(f"{where}: sampled must be spans within its {len(ids)} token_ids")
    return np.concatenate([ids[:0], *(ids[first:behind] for first, behind in part.sampled)])


def _advantages(part: _Tokens, where: str, spread: bool) -> Column | None:
    if part.advantages is not None or part.advantage is None:
        return part.advantages
    per_token = _sampled_ids(part, where) if part.behavior_logp is None else part.behavior_logp
    n = len(per_token) if spread and per_token is not None else 1
    return np.array([part.advantage] * n, dtype=np.float32)


_REMEDIES = {
    "reward": "write `reward`",
    "finish_reason": "write `finish_reason`: stop or length",
    "token_ids": "write `token_ids`",
    "behavior_logp": "write `behavior_logp`, the sampler's log-probability of each token",
    "logp": "write `logp`, the policy's log-probability of each token before the update",
    "held_out": "write `held_out`: true for rollouts of an evaluation, or name them after --held-out",
}
JSONL = Format(
    name="our own description",
    version="",
    suffix=".jsonl",
    keys=frozenset({"step", "problem"}),
    read=read_jsonl,
    objective="ppo(0.2,0.28)",
    remedies=_REMEDIES,
)
PARQUET = replace(JSONL, suffix=".parquet", read=read_parquet)
