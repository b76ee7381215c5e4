"""Trial results, read from the folders of runs; and a whole comparison as one small JSON file."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo.errors import InputError
from drpo.files import require_own, write_text
from drpo.lab.grid import REGIME, differing
from drpo.train.config import Run, flat_json, load_run, to_json
from drpo.train.log import write_json
from drpo.train.optim import stated_learning_rate
from drpo.train.records import (
    CONFIG,
    EVALUATIONS,
    METRICS,
    RESULTS,
    TRIALS,
    read_json,
    read_records,
    refuse_old_comparison,
)

ORDER, TRIAL_RESULT = "trials.json", "trial_result.json"
FINISHED, DIVERGED, FAILED, STOPPED, RUNNING, WAITING = (
    "finished",
    "diverged",
    "failed",
    "stopped",
    "running",
    "waiting",
)
SERIES = (
    "reward_mean",
    "entropy",
    "prob_diff_mean",
    "prob_diff_p99",
    "out_of_region",
    "masked",
    "weight_min",
    "weight_max",
    "ratio_max",
    "k3",
    "truncated",
    "length_terminated",
    "grad_norm",
)
"""The step metrics that results.json keeps."""


@dataclass(frozen=True)
class Trial:
    """One run of a comparison, finished or not.

    Args:
        name: of its folder.
        config: of the run, by the names of its options: `eval_every`, `sampling.samples`.
        status: finished, diverged, failed, stopped, running or waiting.
        reason: why it did not finish, or a warning that it learnt little or nothing; else None.
        series: name of `SERIES` -> its value at every step done, None if a step has none.
        evaluations: (steps done, held-out mean reward) pairs.

    Raises:
        InputError: a score that is not finite, or a finished trial without any.
    """

    name: str
    config: Mapping[str, Any]
    status: str
    reason: str | None
    series: Mapping[str, tuple[float | None, ...]]
    evaluations: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        rewards = [x for x in self.series["reward_mean"] if x is not None]
        scores = [*rewards, *(mean for _, mean in self.evaluations)]
        for score in scores:
            if not isinstance(score, int | float) or not math.isfinite(score):
                raise InputError(f"{self.name}: a score is {score!r}; it must be a finite number")
        if self.status == FINISHED and not scores:
            raise InputError(f"{self.name}: finished, but there is no training reward and no evaluation of it")

    @property
    def objective(self) -> str:
        """The objective's spec."""
        return str(self.config["objective"])

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return stated_learning_rate(self.config["optimizer"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def steps(self) -> int:
        """The planned number of steps."""
        return int(self.config["steps"])

    @property
    def over(self) -> bool:
        """Whether the trial has a result: it finished or diverged."""
        return self.status in (FINISHED, DIVERGED)

    @property
    def rewards(self) -> tuple[float, ...]:
        """Mean training reward of every step; 0 for steps after a divergence."""
        rewards = [x if x is not None else 0.0 for x in self.series["reward_mean"]]
        lost = self.steps - len(rewards) if self.status == DIVERGED else 0
        return (*rewards, *[0.0] * lost)

    @property
    def held_out(self) -> tuple[tuple[int, float], ...]:
        """(steps done, held-out mean reward) pairs; a diverged run ends at 0, because it has no policy."""
        return (*self.evaluations, (self.steps, 0.0)) if self.status == DIVERGED else self.evaluations

    def regime(self, fields: Sequence[str] = REGIME) -> tuple[Any, ...]:
        """Return the trial's values of some fields of the regime."""
        return tuple(self.config[name] for name in fields)


@dataclass(frozen=True)
class Comparison:
    """Runs that differ by objective, seed, learning rate and regime.

    Args:
        name: of the folder.
        trials: in the order of training.
        hardware: the machine, as in `environment.json`.
    """

    name: str
    trials: tuple[Trial, ...]
    hardware: Mapping[str, Any]

    @property
    def regime_fields(self) -> tuple[str, ...]:
        """The fields of the regime that differ between trials."""
        varied = differing([c.config for c in self.trials])
        return tuple(name for name in REGIME if name in varied)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Specs of the objectives, in order."""
        return tuple(dict.fromkeys(c.objective for c in self.trials))

    def by_regime(self) -> Iterator[tuple[tuple[Any, ...], list[Trial]]]:
        """Yield each regime, as values of `regime_fields`, with its trials."""
        fields = self.regime_fields
        for regime in dict.fromkeys(c.regime(fields) for c in self.trials):
            yield regime, [c for c in self.trials if c.regime(fields) == regime]


def write_trial_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write trial_result.json."""
    write_json(folder / TRIAL_RESULT, dict(result))


def prepare(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Create the missing folders of a comparison's trials; return the folders of these runs.

    Args:
        folder: of the comparison; existing trials are kept.
        runs: of the trials.

    Raises:
        InputError: a trial's folder holds another run, or the comparison is of an earlier version.
    """
    if folder.is_dir():
        refuse_old_comparison(folder, os.listdir(folder))
    trials = [folder / TRIALS / run.name for run in runs]
    require_own(folder / TRIALS)
    for trial, run in zip(trials, runs, strict=True):
        require_own(trial)
        if not (trial / CONFIG).exists():
            trial.mkdir(parents=True, exist_ok=True)
            write_json(trial / CONFIG, to_json(run))
        elif to_json(load_run(trial, trust_remote_code=False)) != to_json(run):
            raise InputError(f"{trial}: another run is there under this name; name another folder")
    known = [trial.name for trial in trial_folders(folder)]
    ordered = dict.fromkeys([*(n for n in _order(folder) if n in known), *(run.name for run in runs)])
    write_json(folder / ORDER, {"trials": list(ordered)})
    return trials


def trial_folders(folder: Path) -> list[Path]:
    """Return the folders of a comparison's trials: in the order of its trials.json, then any others."""
    folders = {p.parent.name: p.parent for p in sorted((folder / TRIALS).glob(f"*/{CONFIG}"))}
    return [folders.pop(name) for name in _order(folder) if name in folders] + list(folders.values())


def _order(folder: Path) -> list[str]:
    path = folder / ORDER
    names = read_json(path).get("trials") if path.exists() else []
    if not isinstance(names, list):
        raise InputError(f"{path}: 'trials' must be a list of folders")
    return [str(name) for name in names]


def is_comparison(folder: Path) -> bool:
    """Whether a folder holds the trials of a comparison, or its results.json."""
    return (folder / TRIALS).is_dir() or (folder / RESULTS).exists()


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison from the folders of its trials, or from its results.json if they are gone.

    Raises:
        InputError: no comparison there, or an unreadable file.
    """
    folders = trial_folders(folder)
    if not folders:
        return load_results(folder / RESULTS)
    environments = [trial / "environment.json" for trial in folders]
    hardware: dict[str, Any] = next((read_json(p) for p in environments if p.exists()), {})
    return Comparison(folder.resolve().name, tuple(map(read_trial, folders)), _hardware(hardware))


def read_trial(folder: Path) -> Trial:
    """Read one trial from the folder of its run."""
    metrics = read_records(folder / METRICS)
    try:
        result = read_json(folder / TRIAL_RESULT)
    except FileNotFoundError:
        result = {"status": RUNNING if metrics else WAITING, "reason": None}
    return Trial(
        name=folder.name,
        config=flat_json(load_run(folder, trust_remote_code=False)),
        status=str(result.get("status")),
        reason=result.get("reason"),
        series={name: tuple(m.get(name) for m in metrics) for name in SERIES},
        evaluations=tuple((e["step"], e["reward_mean"]) for e in read_records(folder / EVALUATIONS)),
    )


def _hardware(environment: Mapping[str, Any]) -> dict[str, Any]:
    wanted = ("processor", "cores", "threads", "accelerator", "versions")
    return {name: environment[name] for name in wanted if name in environment}


def save_results(comparison: Comparison, path: Path) -> None:
    """Write a comparison as one JSON file: shared values once, numbers to six digits."""
    varied = ("name", *differing([c.config for c in comparison.trials]))
    shared = {k: v for k, v in comparison.trials[0].config.items() if k not in varied}
    trials = [
        {
            "name": c.name,
            "config": {k: v for k, v in c.config.items() if k in varied},
            "status": c.status,
            "reason": c.reason,
            "series": {k: [None if x is None else float(f"{x:.6g}") for x in v] for k, v in c.series.items()},
            "evaluations": [list(e) for e in c.evaluations],
        }
        for c in comparison.trials
    ]
    record = {"name": comparison.name, "hardware": comparison.hardware, "config": shared}
    lines = ",\n".join(json.dumps(c, ensure_ascii=False) for c in trials)
    text = json.dumps(record, indent=1, ensure_ascii=False)[:-2] + f',\n "trials": [\n{lines}\n]}}\n'
    write_text(path, text)


def load_results(path: Path) -> Comparison:
    """Read a comparison that `save_results` wrote.

    Raises:
        InputError: the file is missing or unreadable.
    """
    try:
        record = read_json(path)
        refuse_old_comparison(path, record)
        trials = tuple(
            Trial(
                name=c["name"],
                config={**record["config"], **c["config"]},
                status=c["status"],
                reason=c["reason"],
                series={k: tuple(v) for k, v in c["series"].items()},
                evaluations=tuple((int(step), float(mean)) for step, mean in c["evaluations"]),
            )
            for c in record["trials"]
        )
        if not trials:
            raise InputError(f"{path}: it holds no trials")
        return Comparison(record["name"], trials, record["hardware"])
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no comparison there ({TRIALS}/ and {RESULTS} are missing)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
