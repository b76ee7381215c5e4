"""A run around the algorithm: start, records, evaluations, checkpoints and end."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from drpo.errors import InputError, Interrupted
from drpo.files import SCRATCH, remove, require_own, require_plain
from drpo.objectives import caution
from drpo.rewards import RewardPool
from drpo.seeds import derive
from drpo.train import checkpoint
from drpo.train.callbacks import Callback
from drpo.train.chapters import Chapter, described, write_chapters
from drpo.train.config import Run, load_run, to_json, trains_little
from drpo.train.continued import chapters_of, samples_anew
from drpo.train.evaluate import before_training, score_held_out, summed_up
from drpo.train.lock import locked
from drpo.train.log import Clock, RunLog, environment, rollout_records, trained_records, write_json
from drpo.train.metrics import (
    endpoint_metrics,
    filter_metrics,
    metrics_by_turn,
    routing_metrics,
    signal_metrics,
    step_metrics,
    value_metrics,
)
from drpo.train.model_folder import write_model
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
    TIMING,
    read_json,
    read_records,
)
from drpo.train.rollouts import Rollouts
from drpo.train.score import require_scored
from drpo.train.setup import Components
from drpo.train.stop import StopRequest
from drpo.train.stored import Progress
from drpo.train.summary import summarise
from drpo.train.verify import is_finished
from drpo.train.warned import WarningLog
from drpo.types import Batch, CriticStats, ScoredGroup, StepStats

APART = ("rollout", "reward")
"""The phases without collectives."""


class Session:
    """A run in one process, from its start or last checkpoint to its end or an interruption.

    With several processes only rank 0 writes, to a folder that all can read.

    Args:
        run: the configuration.
        folder: the run's folder.
        components: the objects built from the configuration.
        callback: receives the run's events.
        keep_model: keep the trained model and a checkpoint at the end; else the records alone.
        accept_records: resume although the records differ from those written before the checkpoint.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        components: Components,
        callback: Callback,
        keep_model: bool = True,
        accept_records: bool = False,
    ) -> None:
        self.run, self.folder, self.components = run, folder, components
        self.callback, self.keep_model = callback, keep_model
        self._accept_records = accept_records
        self.rewards = RewardPool(components.reward, run.rewards.pool)
        self.rollouts = Rollouts(
            run, components.driver, components.held_out, components.ranks, self._apart, components.fits, self.rewards
        )
        self.summary: dict[str, Any] = {}
        self._ranks = components.ranks
        self._log = RunLog(folder, writes=components.ranks.is_main)
        self._clock = Clock()
        self._stop = StopRequest(callback.note)
        self._stopped_by: int | None = None  # the signal, as all ranks know it
        self._done = Progress()
        self._warnings = WarningLog()
        self._between_steps = True
        self._failed_together = False
        self._stack = ExitStack()

    @property
    def step(self) -> int:
        """Rollouts trained on so far."""
        return self._done.step

    def __enter__(self) -> "Session":
        """Read the last checkpoint or begin, start the reward's processes, take over the signals.

        Raises:
            InputError: another process is at this run, none of its checkpoints can be read, or its records are not
                those that were written before the checkpoint.
        """
        try:
            self._begin()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._ranks.reraise_on_all():
            if self._ranks.is_main:
                require_own(self.folder / CHECKPOINTS)
                for name in FILES:
                    require_plain(self.folder / name)
                self._stack.enter_context(locked(self.folder))
        if self._ranks.is_main:
            _tidy(self.folder)
        # Nothing of ours draws from the global generator; a user's objective may.
        torch.manual_seed(derive("global", self.run.seed))
        last = checkpoint.newest_sound(self.folder / CHECKPOINTS, self.callback.note)
        if last is not None:
            self._done = checkpoint.restore(last, self.components.policy.checkpointed(), self.components.optimizer)
        chapters = chapters_of(self.folder, self.run, self._done.step)
        if last is not None:
            self.rollouts.restore(last, self._done.step, ahead=not samples_anew(chapters, self._done.step))
            if self.components.critic is not None:
                self.components.critic.restore(last)
        with self._ranks.reraise_on_all():  # all have read what is there
            self._require_records(last)
        if self._ranks.is_main:
            self._write_configuration(chapters)
            checkpoint.tidy(self.folder / CHECKPOINTS, last)
        self._log.rewind(self._done.step)
        self._ranks.barrier()
        self._warnings = WarningLog(read_records(self.folder / METRICS), read_records(self.folder / EVALUATIONS))
        self._stack.callback(self.components.driver.engine.close)
        self._start_processes()
        self._stack.enter_context(self.rollouts)  # whose thread ends before the processes that it uses
        self._stack.enter_context(self._stop)
        self.callback.started(self.run, self.folder, self._done.step)
        if chapters and chapters[-1].step == self._done.step:
            self.callback.note(described(chapters[-1]))
        if (warning := caution(self.run.objective.loss)) is not None:
            self.callback.note(warning)
        if (warning := trains_little(self.run)) is not None:
            self.callback.note(warning)
        if not self.components.policy.shares_prompts:
            self.callback.note(
                "this model's attention cannot be packed: each completion is trained in a padded row with its prompt"
            )

    def _write_configuration(self, chapters: Sequence[Chapter]) -> None:
        """Write what this session works with, in an order in which a crash loses nothing."""
        write_json(self.folder / ENVIRONMENT, environment())
        if self._done.step < self.run.trainer.steps and is_finished(self.folder):
            (self.folder / SUMMARY).unlink()  # of a run that goes on
        write_chapters(self.folder, chapters)  # first: those that are not in config.json are dropped at the next start
        if not _holds(self.folder / CONFIG, to_json(self.run)):  # what is right is not put at risk
            write_json(self.folder / CONFIG, to_json(self.run))

    def _start_processes(self) -> None:
        """Start the processes of the reward and of environments."""
        self._stack.enter_context(self.rewards)
        for environments in (self.components.driver.environments, self.components.held_out_environments):
            if environments is not None:
                self._stack.enter_context(environments)

    def _require_records(self, last: Path | None) -> None:
        """Refuse records that are not what was written, before any is taken back.

        Raises:
            InputError: they are not; the message says how to go on.
        """
        if self._accept_records or not self._ranks.is_main:
            return
        if last is None:
            self._require_no_lost_checkpoint()
        elif not self._done.records:
            self.callback.note(
                f"{last}: of an earlier version, without sums of the records; they are taken as they are"
            )
        try:
            self._log.require(self._done.records)
        except InputError as error:
            raise InputError(
                f"{error}; put back what was written, or go on with what is there: drpo train --resume {self.folder} "
                "--accept-records"
            ) from None

    def _require_no_lost_checkpoint(self) -> None:
        """A run that recorded more steps than lie before its first checkpoint had one: it is not begun anew over them.

        Raises:
            InputError: it has none now.
        """
        try:
            every = load_run(self.folder, trust_remote_code=False).checkpoints.every  # of the session that recorded
        except InputError:
            every = self.run.checkpoints.every
        recorded = read_records(self.folder / METRICS) if self.keep_model and every else []
        if recorded and recorded[-1]["step"] > every:
            raise InputError(
                f"{self.folder / CHECKPOINTS}: no checkpoint is there, though {recorded[-1]['step']} steps are "
                "recorded; put them back, or start anew in another folder"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Save what is done, whatever ended the run, and sum it up."""
        with self._stack:
            try:
                self._end(error)
            except Exception as problem:
                if error is None:
                    raise
                self.callback.note(
                    f"what was done could not be saved: {problem}"
                )  # what ended the run is said behind it

    def _end(self, error: BaseException | None) -> None:
        done = error is None and self._done.step >= self.run.trainer.steps
        together = self._ranks.size == 1 or self._failed_together  # else the others may be elsewhere
        keeps = self.keep_model or not done
        if keeps and (error is None or (together and self._between_steps and self._done.step > 0)):
            self._save()
        try:
            if done and self.keep_model:
                write_model(self.components.policy, self.components.tokenizer, self.folder / MODEL, self._ranks)
        finally:
            self._sum_up()
        if self._ranks.is_main and not keeps:
            checkpoint.drop_all(self.folder / CHECKPOINTS)

    def _sum_up(self) -> None:
        if self._ranks.is_main:
            self.summary = summarise(self.folder, self.run, self._stopped_by, self._done.step)
            write_json(self.folder / SUMMARY, self.summary)
            self.rollouts.write_pass_rates(self.folder, self._done.step)
            if self.summary["warning"] is not None:
                self.callback.note(self.summary["warning"])
            self.callback.ended(self.summary)

    def steps(self) -> Iterator[int]:
        """Yield the numbers, from 0, of the remaining steps, until the last or until a signal."""
        while not self._asked_to_stop() and self._done.step < self.run.trainer.steps:
            self._clock = Clock()
            yield self._done.step

    def _asked_to_stop(self) -> bool:
        """Return whether any rank received a signal; all ranks then know it."""
        self._stopped_by = self._ranks.all_reduce_max(self._stop.signal or 0) or None
        return self._stopped_by is not None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step and report its start; during the update the weights are between two steps."""
        self.callback.phase(name)
        self._between_steps = name != "update"
        with self._clock(name), self._apart() if name in APART else nullcontext():
            yield

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Re-raise one rank's exception on all ranks, so that they can still save together."""
        try:
            with self._ranks.reraise_on_all():
                yield
        except Interrupted:
            raise
        except Exception:
            self._failed_together = True
            raise

    def gather(self, scored: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Return the groups that all ranks have scored.

        Raises:
            InputError: nothing was scored, or the reward failed where that is an error.
        """
        groups = self._ranks.gather(scored)
        with self._apart():
            require_scored(groups, self.run.rewards.pool)
        return groups

    def finish_step(
        self,
        groups: Sequence[ScoredGroup],
        batches: Sequence[Batch],
        stats: Sequence[StepStats],
        critic_stats: Sequence[CriticStats],
    ) -> None:
        """Record the step that the loop has just done, a critic's updates too; evaluate and save where it is time.

        Raises:
            FloatingPointError: too many updates in a row had a gradient that is not finite.
        """
        done = replace(
            self._done,
            step=self._done.step + 1,
            updates=self._done.updates + len(stats),
            tokens=self._done.tokens + sum(e.n_sampled for g in groups for e in g.episodes),
            skipped=self._count_skipped("policy", self._done.skipped, stats),
            critic_skipped=self._count_skipped("critic", self._done.critic_skipped, critic_stats),
        )
        curriculum = self.rollouts.observe(self._done.step, groups)
        if self._ranks.is_main:
            metrics = {
                "step": done.step,
                **step_metrics(done.step, groups, stats, self.run.objective.loss),
                **signal_metrics(groups, self.components.credits_by_rewards(groups, batches)),
                **filter_metrics(groups),
                **curriculum,
                **metrics_by_turn(groups, batches, stats),
                **routing_metrics(batches),
                **value_metrics(batches, critic_stats),
            }
            self._log.write(ROLLOUTS, *rollout_records(done.step, groups, trained_records(batches, stats)))
            self._log.write(METRICS, metrics)
            self._log.write(TIMING, {"step": done.step, **self._clock.seconds})
        self._done, self._between_steps = done, True  # from here on a checkpoint may claim the step
        if self._ranks.is_main:
            self.callback.stepped(done.step, metrics, self._clock.seconds, groups)
        if left_out := self.rollouts.left_out():
            self.callback.note(
                f"step {done.step}: {left_out} problems left out: their prompts are too long for the model"
            )
        # Rollouts and weights together are what it takes to look into an update that was skipped.
        broken = not (all(s.taken for s in stats) and all(s.taken for s in critic_stats))
        if done.step < self.run.trainer.steps and (broken or _due(self.run.checkpoints.every, done.step)):
            self._save()
        self.evaluate_if_due()
        if self._ranks.is_main:
            self._warn(metrics)

    def _warn(self, metrics: Mapping[str, Any]) -> None:
        """Say which warnings a step and its evaluation raise."""
        for warning in self._warnings.add([metrics]):
            self.callback.note(warning.text)
            self.callback.warned(warning)

    def _count_skipped(self, whose: str, skipped: int, updates: Sequence[StepStats | CriticStats]) -> int:
        """The updates in a row, up to the last of these, that were not made.

        Raises:
            FloatingPointError: they are too many.
        """
        for i, seen in enumerate(updates):
            skipped = 0 if seen.taken else skipped + 1
            if seen.taken:
                continue
            what = f"the gradient's norm is {seen.grad_norm} (loss {seen.loss}) in update {i} of the {whose}"
            if skipped > self.run.faults.max_skipped:
                raise FloatingPointError(f"{what}; the update was not made")
            self.callback.note(f"{what}; it was skipped ({skipped} in a row, at most {self.run.faults.max_skipped})")
        return skipped

    def evaluate_if_due(self) -> None:
        """Evaluate the untrained policy, and wherever else it is time, if an interruption left it out before."""
        step = self._done.step
        due = step in (0, self.run.trainer.steps) or _due(self.run.evaluation.every, step)
        if due and all(record["step"] != step for record in read_records(self.folder / EVALUATIONS)):
            self._evaluate()

    @contextmanager
    def _aside(self, name: str) -> Iterator[None]:
        """Time work outside a step, in a separate line of timing.jsonl."""
        self.callback.phase(name)
        clock = Clock()
        with clock(name):
            yield
        self._log.write(TIMING, {"step": self._done.step, **clock.seconds})

    def _evaluate(self) -> None:
        if not self.components.held_out:
            return
        sampling = replace(self.run.rollout.sampling, samples=self.run.evaluation.samples)
        step = self._done.step
        with suppress(Interrupted), self._aside("evaluation"):
            driver = self.rollouts.current(self.components.policy.state, version=step)
            driver = replace(driver, environments=self.components.held_out_environments)
            with self._apart(), self._stop.interrupting():
                own = self._ranks.shard(self.components.held_out)
                scored = score_held_out(driver, own, sampling, self.rewards, seed=self.run.seed)
            before, n_before = before_training(read_records(self.folder / EVALUATIONS))
            groups = self.gather(scored)
            result = summed_up(groups, sampling.samples, step=step, before=before, n_before=n_before)
            self._log.write(EVALUATIONS, {**asdict(result), **endpoint_metrics(groups)})
            self._warnings.add([], [asdict(result)])
            self.callback.evaluated(result)

    def _save(self) -> None:
        folder = self.folder / CHECKPOINTS
        with self._aside("checkpoint"):
            self._log.sync()
            tensors, optimizer = self.components.policy.checkpointed(), self.components.optimizer
            done = replace(self._done, records=self._log.written())
            checkpoint.save(folder, done, tensors, optimizer, self._save_more, self._ranks)
            if self._ranks.is_main:
                scores = {e["step"]: e["reward_mean"] for e in read_records(self.folder / EVALUATIONS)}
                checkpoint.prune(folder, self.run.checkpoints.keep, scores)

    def _save_more(self, folder: Path) -> list[Path]:
        self.rollouts.save(folder, step=self._done.step)
        return self.components.critic.save(folder) if self.components.critic else []


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _tidy(folder: Path) -> None:
    """Remove partial files of a killed process."""
    for path in folder.glob(f"*{SCRATCH}"):
        remove(path)


def _holds(path: Path, record: dict[str, Any]) -> bool:
    try:
        return read_json(path) == record
    except (OSError, InputError):
        return False
