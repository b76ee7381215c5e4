"""A run of a few completions written by hand, so that every number of its report is known."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drpo.model import loading
from drpo.report.token_statistics import Rollouts, TokenStatistics
from drpo.train.config import Run, to_json
from drpo.train.records import CONFIG, ENVIRONMENT, EVALUATIONS, METRICS, ROLLOUTS, TIMING
from support.worlds import tiny_run

NASTY = "<script>document.title='caught'</script><img src=x onerror=alert(1)>&amp;"

EOS = 0


def record(text: str, mu: Sequence[float] | float, pi: Sequence[float] | None = None, **changes: Any) -> dict[str, Any]:
    """A record of rollouts.jsonl: the bytes of a text, and an EOS where it finished by itself."""
    finish_reason = changes.get("finish_reason", "stop")
    ids = loading.load_tokenizer("tiny")(text)["input_ids"] + ([EOS] if finish_reason == "stop" else [])
    mus = [mu] * len(ids) if isinstance(mu, float) else mu
    assert len(mus) == len(ids) and (pi is None or len(pi) == len(ids))
    found = {
        "step": 1,
        "prompt": "a prompt",
        "answer": "an answer",
        "reward": 0.0,
        "failure": None,
        "problem": "p",
        "sample": 0,
        "text": text,
        "finish_reason": finish_reason,
        "version": 0,
        "prompt_ids": [1, 2],
        "token_ids": ids,
        "behavior_logp": [math.log(m) for m in mus],
        "update": 0,
        "advantage": 0.0,
    }
    trained = {} if pi is None else {"logp": [math.log(p) for p in pi]}
    return {**found, **trained, **changes}


RECORDS = (
    # mu, pi, and with A = 0.5 and delta = 0.2: w = 1 - D / 0.2
    record("abc", [0.4, 0.1, 0.5, 0.9], [0.5, 0.5, 0.45, 0.9], reward=1.0, advantage=0.5, sample=0),
    # with A = -0.5: w = 1 + D / 0.2
    record("xy", [0.4, 0.25, 0.5], [0.3, 0.75, 0.49], advantage=-0.5, sample=1),
    record(NASTY, 0.25, reward=0.5, sample=2),
    record("cut short", 0.5, finish_reason="length", step=2, problem="q", version=1),
    record("no mark", 0.5, step=2, problem="q", sample=1, reward=None, failure="ValueError: no verdict"),
    record("", [0.125], [0.125], step=3, problem="r", reward=2.0, advantage=1.0, prompt="another prompt"),
)
"""Two trained and one skipped at step 1; at step 2 one skipped and one unscored; at step 3 a bare EOS."""


def conversation(**changes: Any) -> dict[str, Any]:
    """A record of three turns: a tool called, a call that failed, and a branch that was not trained."""
    tokenizer = loading.load_tokenizer("tiny")
    one, two, three = ([*tokenizer(text)["input_ids"], EOS] for text in ("ab", "cd", "e"))
    call = {"type": "function", "function": {"name": "double", "arguments": {"x": 2}}}
    return {
        **record("e", 0.5, reward=0.5, problem="talk"),
        "token_ids": [*one, 9, 9, 9, 9, *two],
        "sampled": [[0, 3], [7, 10]],
        "behavior_logp": [math.log(0.4)] * 6,
        "logp": [math.log(p) for p in (0.5, 0.4, 0.4, 0.3, 0.7, 0.4)],
        "advantage": 0.375,
        "advantages": [0.5] * 3 + [0.25] * 3,
        "branches": [
            {"prompt_ids": [1], "token_ids": three, "behavior_logp": [math.log(0.5)] * 2, "update": 0, "advantage": 0.0}
        ],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1?"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "2?"},
            {"role": "assistant", "content": "ab", "tool_calls": [call]},
            {"role": "tool", "name": "double", "content": "4"},
            {"role": "assistant", "content": "cd"},
            {"role": "user", "content": f"Error: {NASTY}"},
            {"role": "assistant", "content": "e"},
        ],
        "turns": [3, 3, 2],
        "played": {
            "rewards": [0.0, 0.5, 0.0],
            "done": True,
            "calls": [1, 0, 0],
            "failed_calls": [0, 1, 0],
            "failure": None,
        },
        "reward_turns": [0.0, 0.5, 0.0],
        **changes,
    }


def write_run(folder: Path, records: Sequence[dict[str, Any]] = RECORDS, **changes: Any) -> Run:
    """Write what the report reads of a run."""
    run = tiny_run(name="by-hand", **changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(to_json(run)))
    (folder / ENVIRONMENT).write_text(json.dumps({"processor": "an abacus", "cores": 1, "versions": {"torch": "2.0"}}))
    steps = sorted({r["step"] for r in records})
    write_lines(folder / ROLLOUTS, records)
    write_lines(folder / METRICS, [metrics(s, [r for r in records if r["step"] == s]) for s in steps])
    ends = [(0, 0.25, 0.1, 0.4), (steps[-1], 0.75, 0.6, 0.9)] if steps else []
    write_lines(
        folder / EVALUATIONS,
        [
            {"step": s, "reward_mean": a, "low": low, "high": high, "n_problems": 30, "n_samples": 1}
            for s, a, low, high in ends
        ],
    )
    times = [{"step": 0, "evaluation": 0.5}, *({"step": s, "rollout": 2.0, "update": 1.0} for s in steps)]
    write_lines(folder / TIMING, [*times, {"step": 1, "checkpoint": 0.25}])
    return run


def metrics(step: int, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Some of what metrics.jsonl says of a step."""
    return {
        "step": step,
        "reward_mean": step / 4,
        "sampled_tokens": sum(len(r.get("token_ids", ())) for r in records),
        "trained_tokens": sum(len(r["token_ids"]) for r in records if "logp" in r),
        "prob_diff_mean": 0.01 * step,
        "prob_diff_p99": 0.1 * step,
        "weight_min": -1.0,
        "weight_mean": 1.0,
        "weight_max": 3.5,
        "grad_norm": 0.5,
        "truncated": 0.25,
        "length_terminated": 3.0,
        "k3": 0.001,
    }


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@dataclass(frozen=True, eq=False)
class RolloutRow:
    """One of a run's completions, taken out of the columns."""

    record: dict[str, Any]
    state: str
    lengths: tuple[int, ...]
    token_ids: NDArray[np.int64]
    mu: NDArray[np.float64]
    trained: NDArray[np.bool_]
    statistics: TokenStatistics | None


def completions(rollouts: Rollouts) -> list[RolloutRow]:
    """The completions one by one; those that no update saw have no statistics."""
    token, seen = 0, 0
    found = []
    for i, lengths in enumerate(rollouts.lengths):
        span = slice(token, token + sum(lengths))
        trained = rollouts.trained[span]
        statistics = rollouts.statistics.at(np.arange(seen, seen + trained.sum())) if trained.any() else None
        columns = (rollouts.token_ids[span], rollouts.mu[span], trained)
        found.append(RolloutRow(rollouts.record(i), rollouts.states[i], lengths, *columns, statistics))
        token, seen = span.stop, seen + trained.sum()
    return found


def updated(rollouts: Rollouts) -> list[tuple[RolloutRow, TokenStatistics]]:
    """The completions that an update saw, and what it saw."""
    return [(c, c.statistics) for c in completions(rollouts) if c.statistics is not None]
