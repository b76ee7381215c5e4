"""prime-rl: the token exports of its trainer, and the traces of its orchestrator.

An export has both log-probabilities and no rewards. A trace has the reward and the sampler's log-probabilities. Name
both where a run has both.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from drpo.autopsy.dumped import Column, Dumped, Format, joined
from drpo.autopsy.lines import Floats, Ints, read_lines
from drpo.errors import InputError


class _Exported(msgspec.Struct):
    step: int
    token_ids: Ints
    loss_mask: Ints
    advantages: Floats
    inference_logprobs: Floats
    trainer_logprobs: Floats
    entropy: Floats


def read_export(path: Path) -> Iterator[Dumped]:
    """Yield the sequences of a rank's file; an export does not name their prompts.

    Raises:
        InputError: the columns of a sequence have different lengths.
    """
    for where, row in read_lines(path, _Exported):
        columns: dict[str, Any] = {name: getattr(row, name) for name in _Exported.__struct_fields__[1:]}
        if len({len(column) for column in columns.values()}) != 1:
            raise InputError(f"{where}: its columns have different lengths")
        sampled = columns["loss_mask"].astype(bool)
        yield Dumped(
            step=row.step,
            group=where,
            reward=None,
            length=int(sampled.sum()),
            token_ids=columns["token_ids"][sampled],
            behavior_logp=columns["inference_logprobs"][sampled],
            logp=columns["trainer_logprobs"][sampled],
            advantages=columns["advantages"][sampled],
            entropy=columns["entropy"][sampled],
        )


class _Id(msgspec.Struct):
    id: str


class _Message(msgspec.Struct):
    role: str = ""
    content: Any = None


class _Node(msgspec.Struct):
    message: _Message
    parent: int | None = None
    sampled: bool = False
    token_ids: Ints | None = None
    mask: Ints | None = None
    logprobs: Floats | None = None
    advantages: Floats | None = None


class _Reward(msgspec.Struct):
    score: float
    weight: float = 1.0


class _Call(msgspec.Struct):
    finish_reason: str | None = None
    error: Any = None


class _Info(msgspec.Struct):
    group_id: str | None = None


class _Error(msgspec.Struct):
    type: str = ""
    message: str = ""


class _Work(msgspec.Struct):
    type: str
    step: int | None = None


class _Run(msgspec.Struct):
    type: str
    step: int | None = None
    work: _Work | None = None


class _Trace(msgspec.Struct):
    nodes: list[_Node]
    calls: list[_Call] = []
    rewards: dict[str, _Reward | None] = {}
    info: _Info | None = None
    run: _Run | None = None
    ok: bool = True
    errors: list[_Error] = []


class _Line(msgspec.Struct):
    """An episode with its traces; in version 0.8 a line is a single trace."""

    traces: list[_Trace] | None = None
    group: _Id | None = None
    run: _Run | None = None
    nodes: list[_Node] | None = None
    calls: list[_Call] = []
    rewards: dict[str, _Reward | None] = {}
    info: _Info | None = None
    ok: bool = True
    errors: list[_Error] = []


def read_traces(path: Path) -> Iterator[Dumped]:
    """Yield the rollouts of a file of traces; the step is in the folder's name, step_N, or else in the record.

    Raises:
        InputError: a record without a step.
    """
    named = re.search(r"step_(\d{1,18})/", path.as_posix())
    for where, line in read_lines(path, _Line):
        run = line.run
        work = run.work if run is not None and run.work is not None else run
        step = int(named[1]) if named else None if work is None else work.step
        if step is None:
            raise InputError(f"{where}: no step, neither in the record's run nor in the folder's name, step_N")
        held_out = work is not None and work.type == "eval"
        traces = line.traces
        if traces is None:
            traces = [_Trace(line.nodes or [], line.calls, line.rewards, line.info, run, line.ok, line.errors)]
        for trace in traces:
            group = line.group.id if line.group else trace.info.group_id if trace.info else None
            yield _rollout(trace, step, group, held_out)


def _rollout(trace: _Trace, step: int, group: str | None, held_out: bool) -> Dumped:
    branch = _last_branch(trace.nodes)
    said = [n for n in branch if n.sampled]
    columns = {name: joined([getattr(n, name) for n in said]) for name in ("logprobs", "advantages")}
    ids = joined([_sampled_ids(n) for n in said])
    prompt = next((_text(n.message.content) for n in branch if n.message.role == "user"), "")
    text = _text(said[-1].message.content) if said else ""
    parts = {name: r.score * r.weight for name, r in trace.rewards.items() if r is not None}
    reasons = [call.finish_reason for call in trace.calls if call.error is None]
    failed = trace.errors[-1] if trace.errors and not trace.ok else None
    return Dumped(
        step=step,
        group=group or prompt,
        reward=sum(parts.values()) if parts else None,
        length=len(text) if ids is None else len(ids),
        prompt=prompt,
        text=text,
        parts=parts if len(parts) > 1 else {},
        failure=None if failed is None else f"{failed.type}: {failed.message}",
        cut=reasons[-1] == "length" if reasons and reasons[-1] is not None else None,
        held_out=held_out,
        token_ids=ids,
        behavior_logp=None if ids is None else columns["logprobs"],
        advantages=None if ids is None else columns["advantages"],
    )


def _last_branch(nodes: Sequence[_Node]) -> list[_Node]:
    """Return the messages on the path from a trace's root to its last message; parents precede children."""
    path: list[_Node] = []
    at: int | None = len(nodes) - 1 if nodes else None
    while at is not None:
        path.append(nodes[at])
        parent = nodes[at].parent
        at = parent if parent is not None and 0 <= parent < at else None
    return path[::-1]


def _sampled_ids(node: _Node) -> Column | None:
    ids, mask = node.token_ids, node.mask
    if ids is None or mask is None or not len(ids) or len(ids) != len(mask):
        return None
    picked: Column = ids[mask.astype(bool)]
    return picked


def _text(content: Any) -> str:
    if isinstance(content, list):  # parts of a message, of which pictures have no text
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


_OPTIONS = {
    "--sampling.max-new-tokens": "the environment's sampling.max_completion_tokens",
    "--sampling.samples": "group_size",
    "--sampling.temperature": "sampling.temperature",
    "--async-steps": "max_off_policy_steps",
    "--max-grad-norm": "optim.max_norm",
}
_REMEDIES = {
    "reward": "name the traces too: rollouts/step_N/train/effective/traces.jsonl",
    "finish_reason": "name the traces too: rollouts/step_N/train/effective/traces.jsonl",
    "logp": "trainer.enable_token_export=true; then name the folder token_exports too",
    "held_out": "name the traces of evaluations too: rollouts/step_N/eval/effective/traces.jsonl",
}
EXPORT = Format(
    name="prime-rl's token exports",
    version="0.8.0",
    suffix=".jsonl",
    keys=frozenset({"inference_logprobs", "trainer_logprobs", "loss_mask"}),
    read=read_export,
    objective="dppo(0.2)",
    remedies=_REMEDIES,
    options=_OPTIONS,
)
TRACES = replace(EXPORT, name="prime-rl's traces", keys=frozenset({"traces"}), read=read_traces)
OLD_TRACES = replace(TRACES, keys=frozenset({"nodes", "rewards"}))
