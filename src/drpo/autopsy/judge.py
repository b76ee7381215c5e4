"""Judges a run by its dump alone: the warnings and the doctor's findings that it would have had."""

import gc
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from drpo.autopsy.dumped import Dumped, Format
from drpo.autopsy.formats import Dumps
from drpo.autopsy.lines import cut_line
from drpo.autopsy.steps import (
    advantages_of,
    broken_logp,
    by_group,
    groups_with_signal,
    scored_groups,
    step_figures,
    step_tokens,
)
from drpo.doctor.distribution import alignment, ratio
from drpo.doctor.finding import Finding
from drpo.doctor.signal import MOST, signal_of
from drpo.errors import InputError, counted
from drpo.objectives import Objective
from drpo.train.evaluate import summed_up
from drpo.train.run_warnings import RULES, SIGNAL_RULES
from drpo.train.warned import raised
from drpo.train.warning_rules import COMPLETIONS, WINDOW
from drpo.types.problem import is_reward, not_a_reward

Record = Mapping[str, Any]

LACKING: Mapping[str, tuple[str, str]] = {
    "reward": ("rewards of rollouts", "which groups are all wrong or all correct, how rewards move"),
    "finish_reason": ("finish reasons", "how many completions are cut"),
    "token_ids": ("token ids", "how many tokens a completion has (lengths are in characters)"),
    "behavior_logp": ("the sampler's log-probabilities", "entropy, engine mismatch, ratios"),
    "logp": ("the policy's log-probabilities", "engine mismatch, ratios, tokens out of the region, other objectives"),
    "held_out": ("held-out rollouts", "whether the reward is hacked"),
}
"""Column that a dump may lack -> its name, and the questions that need it."""

SAMPLE_TOKENS = 4096
"""Tokens of each step that are kept for the replay and the report, in whole groups; at least one group."""
_MOST_RETURNS = 3
"""How often a step may recur, as after a resume; beyond this the rows are unordered."""
BROKEN_LOGP = "broken_logp"
"""Name of what only an autopsy finds: log-probabilities that are none."""
_ORDER = {name: i for i, name in enumerate((BROKEN_LOGP, *(rule.name for rule in RULES)))}
_BROKEN_BY: Mapping[str, str] = {
    "no number": "the logits are broken there: look at the weights and the precision of the step before",
    "positive": "a log-probability is at most 0: write log p, in nats, not p and not -log p",
}
"""How a log-probability is broken -> what to do."""


@dataclass(frozen=True)
class Judgement:
    """The result for a run.

    Args:
        formats: of its files.
        n_files, n_rollouts, n_held_out: numbers of files and rollouts that were read.
        metrics: a record per step, from 1, with the names of `metrics.jsonl`; absent where the dump lacks the data.
        evaluations: records with the names of `evaluations.jsonl`.
        warnings: as in `summary.json`, and `BROKEN_LOGP`, ordered by their first step.
        findings: of the doctor, on the first step.
        lacking: names in `LACKING`.
        notes: further remarks, a line each.
        sample: some groups of each step.
    """

    formats: tuple[Format, ...]
    n_files: int
    n_rollouts: int
    n_held_out: int
    metrics: tuple[Record, ...]
    evaluations: tuple[Record, ...]
    warnings: tuple[Record, ...]
    findings: tuple[Finding, ...]
    lacking: tuple[str, ...]
    notes: tuple[str, ...]
    sample: Mapping[int, Sequence[Dumped]]

    @property
    def remedies(self) -> Mapping[str, str]:
        """Name of a lacking column -> how to make the framework write it."""
        known = {name: text for f in reversed(self.formats) for name, text in f.remedies.items()}
        return {name: known.get(name, "") for name in self.lacking}


class _Reading:
    """Collects the figures of each step and a sample of its rollouts."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.records: dict[int, dict[str, Any]] = {}
        self.completions: dict[int, int] = {}
        self.held_out: dict[int, list[Dumped]] = {}
        self.sample: dict[int, Sequence[Dumped]] = {}
        self.findings: dict[str, Finding] = {}
        self.seen: set[str] = set()
        self.parts: dict[str, None] = {}
        self.n_rollouts, self.n_held_out = 0, 0
        self._broken: dict[int, tuple[int, set[tuple[str, str]]]] = {}
        self._returns: dict[int, int] = {}
        self._from: dict[int, set[str]] = {}

    def add(self, kind: Format, step: int, rollouts: Sequence[Dumped]) -> None:
        """Add consecutive rollouts of one step."""
        self._note(rollouts)
        if kind.name in self._from.setdefault(step, set()):
            self._returns[step] = self._returns.get(step, 0) + 1
            if self._returns[step] > _MOST_RETURNS:
                raise InputError(f"step {step} comes again and again, between others; sort the rollouts by step")
        self._from[step].add(kind.name)
        self.n_rollouts += len(rollouts)
        figures = step_figures(step, rollouts, self.objective)
        first = min(self.records, default=step)
        if step < first:
            self.findings.clear()
        if step <= first:
            self.findings |= {finding.check: finding for finding in first_findings(rollouts, self.objective)}
        self.records[step] = self.records.get(step, {}) | figures
        self.completions[step] = len(rollouts)
        broken, kinds = broken_logp(rollouts)
        if broken:
            self._broken[step] = broken, kinds
        if step not in self.sample or any(r.logp is not None for r in rollouts):
            self.sample[step] = sampled(step, rollouts)

    def evaluated(self, rollouts: Sequence[Dumped]) -> None:
        """Add held-out rollouts."""
        self.n_held_out += len(rollouts)
        for step, of_step in by_step(rollouts):
            kept = (Dumped(r.step, r.group, r.reward, r.length, cut=r.cut, failure=r.failure) for r in of_step)
            self.held_out.setdefault(step, []).extend(kept)

    def _note(self, rollouts: Sequence[Dumped]) -> None:
        columns = {name: name for name in (*LACKING, "entropy") if name != "held_out"} | {"finish_reason": "cut"}
        for name, attribute in columns.items():
            if name not in self.seen and any(getattr(r, attribute) is not None for r in rollouts):
                self.seen.add(name)
        if any(r.failure is not None for r in rollouts):  # a failed reward is not missing from the dump
            self.seen.add("reward")
        self.parts |= dict.fromkeys(name for r in rollouts[:1] for name in r.parts)

    def notes(self, shift: int) -> Iterator[str]:
        """Yield further remarks, a line each."""
        if shift:
            yield "steps are counted from 1 here; the dump counts from 0"
        if self._returns:
            yield f"{counted(len(self._returns), 'step')} came twice, as of a resumed run; the later one counts"
        if len(self.parts) > 1:
            yield f"the reward is the sum of {', '.join(self.parts)}"
        if "entropy" not in self.seen and "behavior_logp" in self.seen:
            yield "the entropy is estimated, by the mean of -log \u03bc over the sampled tokens"

    def broken(self, shift: int) -> Iterator[Record]:
        """Yield the warning of broken log-probabilities, where there are any."""
        if not self._broken:
            return
        at, last = sorted(self._broken), max(self.records)
        kinds = sorted({kind for _, kinds in self._broken.values() for kind in kinds})
        n = sum(n for n, _ in self._broken.values())
        what = " and ".join(f"{column} is {how}" for column, how in kinds)
        advice = "; ".join(_BROKEN_BY[how] for how in dict.fromkeys(how for _, how in kinds))
        yield {
            "name": BROKEN_LOGP,
            "first_step": at[0] + shift,
            "last_step": at[-1] + shift,
            "steps": len(at),
            "times": sum(step - 1 not in self._broken for step in at),
            "text": f"{what} at {counted(n, 'token')}, which no figure counts; {advice}",
            "page": "docs/autopsy.md#what-is-judged-how",
            "ongoing": at[-1] == last,
        }


def judge(dumps: Dumps, objective: Objective, held_out: Dumps | None = None) -> Judgement:
    """Read a run's dump, step by step, and say what went wrong when.

    Args:
        dumps: its files.
        objective: assumed to have trained the run; gives the region and the gradient.
        held_out: files of its evaluations.

    Raises:
        InputError: a file is damaged, no rollout was trained on, or the steps are unordered.
    """
    reading = _Reading(objective)
    with _undisturbed():
        _read(reading, dumps, held_out)
    if not reading.records:
        raise InputError(f"no rollouts that were trained on in {counted(len(dumps.files), 'file')}")
    return _judged(reading, dumps, held_out)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Use one thread, and exclude existing objects, such as modules, from garbage collection.

    The tensors of a step are too small for a second thread. Each of the two saves a third of the time of a large dump.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def _read(reading: _Reading, dumps: Dumps, held_out: Dumps | None) -> None:
    for kind, files in groupby(dumps.files, key=lambda item: item[1]):
        for step, rollouts in by_step(chain.from_iterable(_sound(kind, path) for path, _ in files)):
            training = [r for r in rollouts if not r.held_out]
            if training:
                reading.add(kind, step, training)
            if len(training) < len(rollouts):
                reading.evaluated([r for r in rollouts if r.held_out])
    for path, kind in held_out.files if held_out else ():
        reading.evaluated(list(_sound(kind, path)))


def _judged(reading: _Reading, dumps: Dumps, held_out: Dumps | None) -> Judgement:
    steps = sorted(reading.records)
    shift = 1 if steps[0] == 0 else 0
    metrics = [reading.records[step] | {"step": step + shift} for step in steps]
    evaluations = _evaluations(reading.held_out, shift)
    counts = [{COMPLETIONS: reading.completions[step]} for step in steps]
    warnings: list[Record] = [*raised([r | n for r, n in zip(metrics, counts, strict=True)], evaluations)]
    if any("grad_norm" not in record for record in metrics):  # neither rewards nor advantages
        warnings = [w for w in warnings if w["name"] not in SIGNAL_RULES]
    warnings += reading.broken(shift)
    files = [*dumps.files, *(held_out.files if held_out else ())]
    lacking = [name for name in LACKING if name not in reading.seen | ({"held_out"} if evaluations else set())]
    notes = list(reading.notes(shift))
    for path, kind in files:
        if kind.suffix == ".jsonl" and (line := cut_line(path)) is not None:
            notes.append(f"{path} line {line}: cut, as by a crash; this rollout is left out")
    if dumps.left_out:
        notes.append(f"{counted(len(dumps.left_out), 'file')} left out, no rollouts: {_named(dumps.left_out)}")
    return Judgement(
        formats=tuple(dict.fromkeys(kind for _, kind in files)),
        n_files=len(files),
        n_rollouts=reading.n_rollouts,
        n_held_out=reading.n_held_out,
        metrics=tuple(_published(record, "token_ids" not in lacking) for record in metrics),
        evaluations=tuple({k: v for k, v in e.items() if k != "problem_means"} for e in evaluations),
        warnings=tuple(sorted(warnings, key=lambda w: (w["first_step"], _ORDER[w["name"]]))),
        findings=tuple(reading.findings.values()),
        lacking=tuple(lacking),
        notes=tuple(notes),
        sample={step + shift: rollouts for step, rollouts in sorted(reading.sample.items())},
    )


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (", ..." if len(paths) > 3 else "")


def _published(record: Record, in_tokens: bool) -> Record:
    """Rename the lengths of a step that count characters, not tokens."""
    if in_tokens:
        return record
    names = {"length_terminated": "characters_terminated", "length_truncated": "characters_truncated"}
    return {names.get(name, name): value for name, value in record.items()}


def _sound(kind: Format, path: Path) -> Iterator[Dumped]:
    """Yield the rollouts of a file, checked; a reward that is not a finite number becomes a failure."""
    for i, rollout in enumerate(kind.read(path), 1):
        if (fault := rollout.fault()) is not None:
            raise InputError(f"{path}, rollout {i}: {fault}")
        if rollout.reward is None or is_reward(rollout.reward):
            yield rollout
        else:
            yield replace(rollout, reward=None, failure=f"the reward is {not_a_reward(rollout.reward)}")


def by_step(rollouts: Iterable[Dumped]) -> Iterator[tuple[int, list[Dumped]]]:
    """Yield each run of consecutive rollouts of one step."""
    for step, of_step in groupby(rollouts, key=lambda r: r.step):
        yield step, list(of_step)


def _evaluations(held_out: Mapping[int, Sequence[Dumped]], shift: int) -> list[dict[str, Any]]:
    """Return a record per evaluation, compared with the first evaluation."""
    found: list[dict[str, Any]] = []
    for step, rollouts in sorted(held_out.items()):
        groups = [g for g in scored_groups(rollouts) if g.episodes]
        if groups:
            n_samples = max(len(g.all_episodes) for g in groups)
            before = found[0]["problem_means"] if found else None
            record = asdict(summed_up(groups, n_samples, step=step + shift, before=before))
            found.append({name: value for name, value in record.items() if value is not None})
    return found


def sampled(step: int, rollouts: Sequence[Dumped]) -> Sequence[Dumped]:
    """Return whole groups of about `SAMPLE_TOKENS` tokens, drawn deterministically; at least one."""
    groups = by_group(rollouts)
    drawn = sorted(groups, key=lambda name: zlib.crc32(f"{step}/{name}".encode("utf-8", "surrogatepass")))
    kept: set[str] = set()
    total = 0
    for name in drawn:
        total += sum(r.length for r in groups[name])
        if kept and total > SAMPLE_TOKENS:
            break
        kept.add(name)
    return [r for r in rollouts if r.group in kept]


def first_findings(rollouts: Sequence[Dumped], objective: Objective) -> Iterator[Finding]:
    """Yield the doctor's findings on the first step: the groups' signal, and the agreement of both engines.

    Args:
        rollouts: of the step.
        objective: gives the region.
    """
    pushed = advantages_of(rollouts)
    groups = [g for g in scored_groups(rollouts) if g.episodes][:MOST]
    if groups:
        with_signal = groups_with_signal(rollouts, pushed)[:MOST]
        yield signal_of(groups, sum(with_signal), ends_known=all(r.cut is not None for r in rollouts))
    first = [(r, a) for r, a in zip(rollouts, pushed, strict=True) if r.update == 0]
    tokens = step_tokens([r for r, _ in first], [a for _, a in first])
    if tokens is not None and len(tokens.entropy) > 1:
        yield ratio(tokens.tokens, tokens.entropy, objective)
        yield alignment(tokens.lengths, tokens.tokens.behavior_logp, tokens.tokens.logp)


def onset(judgement: Judgement) -> int:
    """Return the step at which the first warning held; the last step where none did."""
    return int(judgement.warnings[0]["first_step"] if judgement.warnings else judgement.metrics[-1]["step"])


def compared(judgement: Judgement, names: Iterable[str]) -> list[tuple[str, float | None, float | None, float | None]]:
    """Return the means of some figures over the first steps, the steps before the first warning, and the last steps.

    Args:
        judgement: of a run.
        names: of figures; figures without a value are left out.
    """
    metrics = judgement.metrics
    at = next((i for i, record in enumerate(metrics) if record["step"] >= onset(judgement)), 0)
    windows = (metrics[:WINDOW], metrics[max(0, at + 1 - WINDOW) : at + 1], metrics[-WINDOW:])
    rows = []
    for name in names:
        first, before, last = (_mean(window, name) for window in windows)
        if any(mean is not None for mean in (first, before, last)):
            rows.append((name, first, before, last))
    return rows


def _mean(window: Sequence[Record], name: str) -> float | None:
    values = [record[name] for record in window if name in record]
    return fmean(values) if values else None
