"""Dumps in the form of each framework, written by hand after its own writing code, of rollouts that fail in one way.

`tests/test_autopsy.py` compares the fields with files in `tests/data/autopsy`, which that code has written.
"""

import json
import pickle
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

STEPS, GROUPS, SAMPLES = 14, 2, 4


@dataclass(frozen=True)
class Made:
    """One made-up rollout, with all that any format has."""

    step: int
    group: int
    sample: int
    reward: float | None
    ids: tuple[int, ...]
    mu: tuple[float, ...]
    logp: tuple[float, ...]
    advantage: float
    cut: bool = False
    failure: str | None = None

    @property
    def prompt(self) -> str:
        return f"question {self.group} of step {self.step}"

    @property
    def text(self) -> str:
        return "word " * len(self.ids)


def sound(steps: int = STEPS, groups: int = GROUPS, samples: int = SAMPLES) -> list[Made]:
    """A run that learns: its reward rises, its entropy falls somewhat, pi stays near mu."""
    return [_made(s, g, i, steps) for s in range(1, steps + 1) for g in range(groups) for i in range(samples)]


def _made(step: int, group: int, sample: int, steps: int) -> Made:
    lot = random.Random(f"{step}/{group}/{sample}")
    n = 6 + lot.randrange(3)
    height = 1.0 - 0.4 * step / steps
    mu = [-height * (0.5 + lot.random()) for _ in range(n)]
    noise = 0.0 if step == 1 else 0.02
    reward = 0.25 if step <= steps // 3 else 0.5 if step <= 2 * steps // 3 else 0.75
    paid = float(sample < reward * SAMPLES)
    return Made(
        step,
        group,
        sample,
        paid,
        tuple(lot.randrange(100) for _ in range(n)),
        tuple(mu),
        tuple(min(0.0, m + noise * lot.uniform(-1, 1)) for m in mu),
        paid - reward,
    )


def paying(rollout: Made, rewards: Sequence[float]) -> Made:
    """The same with the rewards of its group."""
    mean = sum(rewards) / len(rewards)
    return replace(rollout, reward=rewards[rollout.sample], advantage=rewards[rollout.sample] - mean)


def _flat(rollout: Made) -> Made:
    return paying(rollout, (1.0, 0.0, 0.0, 0.0))


def _scaled(rollout: Made, factor: float) -> Made:
    mu = tuple(m * factor for m in rollout.mu)
    return replace(rollout, mu=mu, logp=mu)


def _longer(rollout: Made) -> Made:
    k = 1 + rollout.step // 4
    return replace(rollout, ids=rollout.ids * k, mu=rollout.mu * k, logp=rollout.logp * k)


def _jumped(rollout: Made) -> Made:
    """In one step unlikely tokens with a negative advantage become likely."""
    if rollout.step != 13 or rollout.advantage >= 0:
        return rollout
    n = len(rollout.ids)
    return replace(rollout, mu=(-6.0,) * n, logp=(-0.1,) * n)


def _moved(rollout: Made) -> Made:
    by = 0.08 * rollout.step
    return replace(rollout, logp=tuple(min(0.0, m - by if i % 2 else m + by) for i, m in enumerate(rollout.mu)))


Change = Callable[[Made], Made]
FAILURES: Mapping[str, Change] = {
    "no_signal": lambda r: paying(r, (0.3,) * SAMPLES),
    "nothing_correct": lambda r: paying(r, (0.0,) * SAMPLES),
    "everything_correct": lambda r: paying(r, (1.0,) * SAMPLES),
    "failing_rewards": lambda r: replace(r, reward=None, failure="it timed out") if r.sample == 3 else r,
    "truncation": lambda r: replace(r, cut=r.sample > 0),
    "entropy_collapse": lambda r: _scaled(_flat(r), 0.4 ** (r.step - 1)),
    "entropy_explosion": lambda r: _scaled(_flat(r), 1.0 + 0.2 * r.step),
    "sampler_mismatch": lambda r: replace(r, logp=tuple(0.6 * m for m in r.mu)),
    "rising_out_of_region": _moved,
    "gradient_spike": _jumped,
    "length_drift": lambda r: _longer(_flat(r)),
    "reward_collapse": lambda r: paying(r, (1.0, 1.0, 1.0, 0.0) if r.step < 8 else (1.0, 0.0, 0.0, 0.0)),
    "reward_hacking": lambda r: r,
}
"""Name of the warning that must come first -> what is done to the rollouts of a sound run."""
BY_TEXT = ("no_signal", "nothing_correct", "everything_correct", "length_drift", "reward_collapse", "reward_hacking")
BY_TOKENS = ("sampler_mismatch", "rising_out_of_region", "gradient_spike")
BY_SAMPLER = ("truncation", "entropy_collapse", "entropy_explosion")


def failing(name: str) -> list[Made]:
    """The rollouts of a run that fails so."""
    return [FAILURES[name](rollout) for rollout in sound()]


def held_out(step: int, mean: float, problems: int = 40) -> list[Made]:
    """An evaluation: of so many problems one rollout each."""
    rows = sound(1, problems, 1)
    return [replace(r, step=step, reward=float(r.group < mean * problems)) for r in rows]


def write_json_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def by_step(rollouts: Sequence[Made]) -> dict[int, list[Made]]:
    steps: dict[int, list[Made]] = {}
    for rollout in rollouts:
        steps.setdefault(rollout.step, []).append(rollout)
    return steps


def verl(folder: Path, rollouts: Sequence[Made]) -> Path:
    for step, of_step in by_step(rollouts).items():
        rows = [
            {"input": r.prompt, "output": r.text, "gts": "7", "score": r.reward, "step": step, "acc": r.reward == 1}
            for r in of_step
        ]
        write_json_lines(folder / f"{step}.jsonl", rows)
    return folder


def trl(folder: Path, rollouts: Sequence[Made]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for step, of_step in by_step(rollouts).items():
        table = pa.table(
            {
                "step": [step] * len(of_step),
                "prompt": [r.prompt for r in of_step],
                "completion": [r.text for r in of_step],
                "right": [float("nan") if r.reward is None else r.reward for r in of_step],
                "advantage": [r.advantage for r in of_step],
            }
        )
        pq.write_table(table, folder / f"completions_{step:05d}.parquet")
    return folder


def prime_export(folder: Path, rollouts: Sequence[Made]) -> Path:
    for step, of_step in by_step(rollouts).items():
        rows = [_exported(step, i, r) for i, r in enumerate(of_step)]
        write_json_lines(folder / "token_exports" / f"step_{step}" / "rank_0.jsonl", rows)
    return folder


def _exported(step: int, i: int, r: Made) -> dict[str, Any]:
    n, prompt = len(r.ids), [1, 2]
    ratio = [a - b for a, b in zip(r.logp, r.mu, strict=True)]
    padded = {
        "token_ids": [*prompt, *r.ids],
        "position_ids": list(range(n + 2)),
        "loss_mask": [False, False] + [True] * n,
        "advantages": [r.advantage] * (n + 2),
        "inference_logprobs": [0.0, 0.0, *r.mu],
        "trainer_logprobs": [-1.0, -2.0, *r.logp],
        "entropy": [1.0, 1.0, *(-x for x in r.logp)],
        "log_importance_ratio": [0.0, 0.0, *ratio],
        "rl_weights": [None] * (n + 2),
    }
    return {"schema_version": 1, "step": step, "rank": 0, "micro_step": i, "env_name": "letters", **padded}


def prime_traces(folder: Path, rollouts: Sequence[Made], kind: str = "train") -> Path:
    for step, of_step in by_step(rollouts).items():
        rows = [_episode(step, r, kind) for r in of_step]
        home = folder / "rollouts" / f"step_{step}" / kind
        write_json_lines(home / "effective" / "traces.jsonl", rows)
        write_json_lines(home / "all" / "traces.jsonl", rows * 2)
    return folder


def _episode(step: int, r: Made, kind: str) -> dict[str, Any]:
    sampled = {
        "parent": 0,
        "message": {"role": "assistant", "content": r.text},
        "sampled": True,
        "token_ids": [3, *r.ids],
        "mask": [False] + [True] * len(r.ids),
        "logprobs": list(r.mu),
        "advantages": [r.advantage] * len(r.ids),
    }
    asked = {
        "message": {"role": "user", "content": r.prompt},
        "sampled": False,
        "token_ids": [1, 2],
        "mask": [False] * 2,
    }
    trace = {
        "id": f"{step}-{r.group}-{r.sample}",
        "nodes": [asked, sampled],
        "calls": [{"node": 1, "finish_reason": "length" if r.cut else "stop"}],
        "rewards": {"right": None if r.reward is None else {"score": r.reward, "weight": 1.0}},
        "ok": r.failure is None,
        "errors": [] if r.failure is None else [{"type": "TimeoutError", "message": r.failure}],
    }
    return {
        "id": trace["id"],
        "env": {"id": "letters"},
        "group": {"id": f"{step}/{r.group}"},
        "run": {"type": "train", "id": "a run", "work": {"type": kind, "step": step}},
        "ok": r.failure is None,
        "errors": [],
        "traces": [trace],
    }


SKYRL = "skyrl.backends.skyrl_train.training_batch"


class _Pickled:
    """Pickles as a call."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def _skyrl_classes() -> tuple[Any, Any]:
    """A class and a function that pickle as SkyRL's do."""
    module = ModuleType(SKYRL)
    exec("class TrainingInputBatch: pass\ndef _rebuild_tensor_batch(cls, state): return state", module.__dict__)
    for name in ("TrainingInputBatch", "_rebuild_tensor_batch"):
        getattr(module, name).__module__ = SKYRL
    parts = SKYRL.split(".")
    for i in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    sys.modules[SKYRL] = module
    return module.TrainingInputBatch, module._rebuild_tensor_batch


def skyrl(folder: Path, rollouts: Sequence[Made]) -> Path:
    kind, rebuild = _skyrl_classes()
    try:
        for step, of_step in by_step(rollouts).items():
            path = folder / "dumped_data" / f"global_step_{step}_training_input.pkl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(_Pickled(rebuild, (kind, _skyrl_state(of_step)))))
    finally:
        for i in range(1, SKYRL.count(".") + 2):
            sys.modules.pop(".".join(SKYRL.split(".")[:i]), None)
    return folder


def _skyrl_state(of_step: Sequence[Made]) -> dict[str, Any]:
    width = max(len(r.ids) for r in of_step)
    prompts = [(5, 6, 10 + r.group) for r in of_step]
    whole = 3 + width

    def right(values: Sequence[Any], size: int) -> list[Any]:
        return [0] * (size - len(values)) + list(values)

    columns = {
        "sequences": (np.int64, [right((*p, *r.ids), whole) for p, r in zip(prompts, of_step, strict=True)]),
        "attention_mask": (np.int64, [right([1] * (3 + len(r.ids)), whole) for r in of_step]),
        "response_mask": (np.int64, [right([1] * len(r.ids), width) for r in of_step]),
        "loss_mask": (np.float32, [right([1] * len(r.ids), width) for r in of_step]),
        "rollout_logprobs": (np.float32, [right(r.mu, width) for r in of_step]),
        "action_log_probs": (np.float32, [right(r.logp, width) for r in of_step]),
        "advantages": (np.float32, [right([r.advantage] * len(r.ids), width) for r in of_step]),
        "returns": (np.float32, [right([r.advantage] * len(r.ids), width) for r in of_step]),
    }
    arrays = {name: np.array(rows, dtype=dtype) for name, (dtype, rows) in columns.items()}
    stored: dict[str, Any] = {
        name: {"format": "numpy", "data": a.tobytes(), "shape": a.shape, "dtype": str(a.dtype)}
        for name, a in arrays.items()
    }
    known = [r.reward for r in of_step if r.reward is not None]
    metrics = {"avg_final_rewards": sum(known) / len(known), "avg_response_length": 7.0}
    metadata = {"response_length": width, "avg_response_length": 7.0, "metrics": metrics, "pad_size": 0}
    unused = {"base_action_log_probs": None, "values": None}
    return {"batch_dict": stored | unused, "batch_size": len(of_step), "device": None, "metadata": metadata}


def skyrl_evaluation(folder: Path, rollouts: Sequence[Made]) -> Path:
    for step, of_step in by_step(rollouts).items():
        rows = [
            {
                "input_prompt": r.prompt,
                "output_response": r.text,
                "score": r.reward,
                "stop_reason": "length" if r.cut else "stop",
                "env_class": "letters",
                "env_extras": {},
                "data_source": "letters",
            }
            for r in of_step
        ]
        home = folder / "dumped_evals" / f"global_step_{step}_evals"
        write_json_lines(home / "letters.jsonl", rows)
        write_json_lines(home / "aggregated_results.jsonl", [{"eval/all/avg_score": 0.5}])
    return folder


def open_instruct(folder: Path, rollouts: Sequence[Made]) -> Path:
    rows = [
        {
            "step": r.step,
            "sample_idx": r.group * SAMPLES + r.sample,
            "prompt_idx": r.group,
            "prompt_tokens": [1, 2],
            "response_tokens": list(r.ids),
            "reward": r.reward,
            "advantage": r.advantage,
            "finish_reason": "length" if r.cut else "stop",
            "dataset": "letters",
            "ground_truth": [7],
            "request_info": None,
            "logprobs": list(r.mu),
        }
        for r in rollouts
    ]
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        write_json_lines(folder / f"letters_rollouts_{shard:06d}.jsonl", part)
    write_json_lines(folder / "letters_metadata.jsonl", [{"run_name": "letters", "git_commit": "0" * 40}])
    return folder


def own_records(rollouts: Sequence[Made], is_held_out: bool = False) -> list[dict[str, Any]]:
    return [
        {
            "step": r.step,
            "problem": f"{r.step}-{r.group}" if not is_held_out else f"held-out-{r.group}",
            "prompt": r.prompt,
            "text": r.text,
            "reward": r.reward,
            "failure": r.failure,
            "finish_reason": "length" if r.cut else "stop",
            "held_out": is_held_out,
            "token_ids": list(r.ids),
            "behavior_logp": list(r.mu),
            "logp": list(r.logp),
            "advantage": r.advantage,
        }
        for r in rollouts
    ]


def own_jsonl(folder: Path, rollouts: Sequence[Made]) -> Path:
    return write_json_lines(folder / "rollouts.jsonl", own_records(rollouts))


def own_parquet(folder: Path, rollouts: Sequence[Made]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rollouts.parquet"
    pq.write_table(pa.Table.from_pylist(own_records(rollouts)), path)
    return path


@dataclass(frozen=True)
class Written:
    """How dumps of a format are written for tests.

    Args:
        write: receives a folder and rollouts; returns what to name on the command line.
        evaluate: the same for held-out rollouts; None where the format has none.
        apart: whether those are named after --held-out.
        shows: warnings that it can show.
    """

    write: Callable[[Path, Sequence[Made]], Path]
    evaluate: Callable[[Path, Sequence[Made]], Path] | None
    apart: bool
    shows: tuple[str, ...]


def _own_held_out(folder: Path, rollouts: Sequence[Made]) -> Path:
    return write_json_lines(folder / "held_out.jsonl", own_records(rollouts, is_held_out=True))


def _traces_held_out(folder: Path, rollouts: Sequence[Made]) -> Path:
    return prime_traces(folder, rollouts, "eval")


EVERY = tuple(FAILURES)
FORMATS: Mapping[str, Written] = {
    "verl": Written(verl, verl, True, BY_TEXT),
    "trl": Written(trl, trl, True, BY_TEXT),
    "prime_export": Written(prime_export, None, False, (*BY_TOKENS, "no_signal")),
    "prime_traces": Written(prime_traces, _traces_held_out, False, (*BY_TEXT, *BY_SAMPLER, "failing_rewards")),
    "skyrl": Written(
        skyrl,
        skyrl_evaluation,
        False,
        (*BY_TOKENS, *BY_SAMPLER[1:], "no_signal", "length_drift", "reward_collapse", "reward_hacking"),
    ),
    "open_instruct": Written(open_instruct, _own_held_out, True, (*BY_TEXT, *BY_SAMPLER)),
    "own_jsonl": Written(own_jsonl, _own_held_out, True, EVERY),
    "own_parquet": Written(own_parquet, _own_held_out, True, ("no_signal", "truncation", "sampler_mismatch")),
}
