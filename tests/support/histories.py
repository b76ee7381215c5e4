"""Histories of metrics made by hand: a run that learns, and what a fault makes of it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drpo.lab.trial_result import Trial, load_results

RESULTS = Path(__file__).resolve().parents[2] / "studies" / "results"
STEPS = 16
Records = list[dict[str, Any]]


def wobble(step: int) -> float:
    """Noise that is the same in every run: between -1 and 1."""
    return math.sin(12.9898 * step) * math.cos(4.1414 * step)


def sound(steps: int = STEPS) -> Records:
    """The metrics of a run that learns: its reward rises from 0.1 to 0.8, its entropy falls to a tenth."""
    records = []
    for step in range(1, steps + 1):
        done = (step - 1) / max(1, steps - 1)
        reward = min(1.0, 0.1 + 0.7 * done + 0.03 * wobble(step))
        records.append(
            {
                "step": step,
                "reward_mean": reward,
                "reward_std": math.sqrt(reward * (1 - reward)),
                "groups_all_wrong": 0.5 * (1 - done),
                "groups_all_correct": 0.5 * done,
                "frac_reward_zero_std": 0.5,
                "truncated": 0.6 * (1 - done) ** 2,
                "length_terminated": 12 + wobble(step + 1),
                "length_truncated": 32.0,
                "sampled_tokens": 1500,
                "reward_failed": 0,
                "reward_abstained": 0,
                "entropy": 1.5 * 0.1**done,
                "masked": 0.02,
                "out_of_region": 0.02 + 0.01 * wobble(step),
                "ratio_mean": 1.01,
                "k3": 0.03,
                "grad_norm": 1.0 + 0.5 * wobble(step + 2),
                "updates": [{"ratio_mean": 1.0, "k3": 0.001}, {"ratio_mean": 1.02, "k3": 0.06}],
            }
        )
    return records


def changed(**columns: Callable[[int], Any]) -> Records:
    """A sound run with some metrics as functions of the step; None leaves one out."""
    records = []
    for record in sound():
        values = {name: column(record["step"]) for name, column in columns.items()}
        records.append({k: v for k, v in (record | values).items() if v is not None})
    return records


def evaluation(step: int, mean: float, half: float = 0.05) -> dict[str, Any]:
    """A record of evaluations.jsonl."""
    return {"step": step, "reward_mean": mean, "low": mean - half, "high": mean + half}


def recorded() -> Mapping[str, tuple[Records, Records]]:
    """Metrics and evaluations of runs of SmolLM2-135M with recipes of this package: what the rules read, six digits."""
    runs = json.loads((RESULTS.parents[1] / "tests" / "data" / "sound_runs.json").read_text())
    return {f"{r['name']}, seed {r['seed']}, {len(r['metrics'])} steps": (r["metrics"], r["evaluations"]) for r in runs}


def of_trial(trial: Trial) -> tuple[Records, Records]:
    """The metrics and the evaluations that results.json keeps of a run; its rewards are 0 or 1."""
    steps = range(len(trial.series["reward_mean"]))
    cut = trial.config["sampling.max_new_tokens"]
    metrics = [{k: v[i] for k, v in trial.series.items() if v[i] is not None} for i in steps]
    spread = [math.sqrt(max(0.0, m["reward_mean"] * (1 - m["reward_mean"]))) for m in metrics]
    more = [{"step": i + 1, "reward_std": spread[i], "length_truncated": cut, "updates": [{}]} for i in steps]
    return [m | rest for m, rest in zip(metrics, more, strict=True)], [
        {"step": step, "reward_mean": mean} for step, mean in trial.evaluations
    ]


def committed(name: str) -> Sequence[Trial]:
    """The runs of a committed comparison."""
    return load_results(RESULTS / name).trials


def without_noise(trials: Sequence[Trial]) -> Mapping[str, Trial]:
    """Those whose sampler is as fine as the trainer."""
    return {trial.name: trial for trial in trials if trial.config["rollout_precision"] == "auto"}
