"""What every run has around its loop, of RL and of fine-tuning: folder, records, checkpoints, signals and end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import torch
from transformers import PreTrainedTokenizerBase

from drpo.errors import InputError, as_typed
from drpo.files import SCRATCH, remove, require_own, require_plain
from drpo.model.policy import Policy
from drpo.ranks import Ranks
from drpo.seeds import derive
from drpo.train import checkpoint
from drpo.train.callbacks import Callback
from drpo.train.config import CheckpointConfig, FaultConfig
from drpo.train.ending import reason
from drpo.train.lock import locked
from drpo.train.log import Clock, RunLog, environment, write_json
from drpo.train.model_folder import write_model
from drpo.train.records import (
    CHECKPOINTS,
    ENVIRONMENT,
    EVALUATIONS,
    FILES,
    METRICS,
    MODEL,
    SUMMARY,
    TIMING,
    read_records,
)
from drpo.train.stop import StopRequest
from drpo.train.stored import Progress
from drpo.train.verify import is_finished
from drpo.types import CriticStats, StepStats


class Steps(Protocol):
    """What a session reads of the trainer's configuration."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""


class Config(Protocol):
    """What a session reads of a configuration."""

    @property
    def trainer(self) -> Steps: ...
    @property
    def checkpoints(self) -> CheckpointConfig: ...
    @property
    def faults(self) -> FaultConfig: ...
    @property
    def seed(self) -> int: ...


class Trained(Protocol):
    """What a session reads of the objects that were built from a configuration."""

    @property
    def policy(self) -> Policy: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def ranks(self) -> Ranks: ...


class RunSession(ABC):
    """A run in one process, from its start or last checkpoint to its end or an interruption.

    With several processes only rank 0 writes, to a folder that all can read.

    Args:
        config: the configuration.
        folder: the run's folder.
        trained: the model, its optimiser and tokenizer, and the processes that train it.
        callback: receives the run's events.
        accept_records: resume although the records differ from those written before the checkpoint.
        keep_model: keep the trained model and a checkpoint at the end; else the records alone.
    """

    command: ClassVar[str]
    """The command that resumes such a run."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        trained: Trained,
        callback: Callback,
        accept_records: bool = False,
        keep_model: bool = True,
    ) -> None:
        self.folder, self.callback, self.keep_model = folder, callback, keep_model
        self.summary: dict[str, Any] = {}
        self._config, self._trained, self._ranks = config, trained, trained.ranks
        self._accept_records = accept_records
        self._log = RunLog(folder, writes=trained.ranks.is_main)
        self._clock = Clock()
        self._stop = StopRequest(callback.note)
        self._stopped_by: int | None = None  # the signal, as all ranks know it
        self._done = Progress()
        self._between_steps = True
        self._failed_together = False
        self._is_recorded = False  # this session in the run's folder
        self._stack = ExitStack()

    def _resumed_by(self) -> str:
        """Return the command that goes on with this run."""
        return f"{self.command} --resume {as_typed(self.folder)}"

    @abstractmethod
    def _begin(self) -> None:
        """Read the last checkpoint or begin, and enter into `_stack` what the run needs while it lasts."""

    @abstractmethod
    def _recorded_config(self) -> Config:
        """Return the configuration in the folder.

        Raises:
            InputError: there is none, or it cannot be read.
        """

    @abstractmethod
    def _save(self) -> None:
        """Write a checkpoint."""

    @abstractmethod
    def _sum_up(self, reason: str | None) -> None:
        """Write what the whole run came to, and why it ended early, or None; on rank 0."""

    def __enter__(self) -> Self:
        """Read the last checkpoint or begin, and take over the signals.

        Raises:
            InputError: another process is at this run, none of its checkpoints can be read, or its records are not
                those that were written before the checkpoint.
        """
        try:
            self._begin()
        except BaseException as error:
            why = reason(error)
            with self._stack:
                if self._is_recorded and not is_finished(self.folder):  # else an earlier session's summary stays
                    self._try(lambda: self._sum_up(why))
            raise
        return self

    def _open_folder(self) -> None:
        """Take the folder for this process, and remove partial files of a killed one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._ranks.reraise_on_all():
            if self._ranks.is_main:
                require_own(self.folder / CHECKPOINTS)
                for name in FILES:
                    require_plain(self.folder / name)
                self._stack.enter_context(locked(self.folder))
        if self._ranks.is_main:
            _tidy(self.folder)

    def _read_checkpoint(self) -> Path | None:
        """Restore the newest sound checkpoint and return it; None where the run begins."""
        # Nothing of ours draws from the global generator; a user's objective may.
        torch.manual_seed(derive("global", self._config.seed))
        last = checkpoint.newest_sound(self.folder / CHECKPOINTS, self.callback.note)
        if last is not None:
            tensors = self._trained.policy.checkpointed()
            self._done = checkpoint.restore(last, tensors, self._trained.optimizer)
        return last

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
                f"{error}; put back what was written, or go on with what is there: {self._resumed_by()} "
                "--accept-records"
            ) from None

    def _require_no_lost_checkpoint(self) -> None:
        """A run that recorded more steps than lie before its first checkpoint had one: it is not begun anew over them.

        Raises:
            InputError: it has none now.
        """
        try:
            every = self._recorded_config().checkpoints.every  # of the session that recorded
        except InputError:
            every = self._config.checkpoints.every
        recorded = read_records(self.folder / METRICS) if self.keep_model and every else []
        if recorded and recorded[-1]["step"] > every:
            raise InputError(
                f"{self.folder / CHECKPOINTS}: no checkpoint is there, though {recorded[-1]['step']} steps are "
                "recorded; put them back, or start anew in another folder"
            )

    def _write_environment(self, **more: str) -> None:
        """Write what this session works with, and more of it; the summary of a run that goes on is removed."""
        write_json(self.folder / ENVIRONMENT, environment() | more)
        self._is_recorded = True
        if self._done.step < self._config.trainer.steps and is_finished(self.folder):
            (self.folder / SUMMARY).unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Save what is done, whatever ended the run, and sum it up."""
        with self._stack:
            if error is None:
                self._end(None)
            else:
                self._try(lambda: self._end(error))

    def _try(self, save: Callable[[], None]) -> None:
        """Save what is left of a run after an error, which is the one to raise."""
        try:
            save()
        except Exception as problem:
            self.callback.note(f"what was done could not be saved: {problem}")

    def _end(self, error: BaseException | None) -> None:
        done = error is None and self._done.step >= self._config.trainer.steps
        together = self._ranks.size == 1 or self._failed_together  # else the others may be elsewhere
        keeps = self.keep_model or not done
        stopped_by = None if done else self._stopped_by
        try:
            if keeps and (error is None or (together and self._between_steps and self._done.step > 0)):
                self._save()
            if done and self.keep_model:
                write_model(self._trained.policy, self._trained.tokenizer, self.folder / MODEL, self._ranks)
        except BaseException as problem:
            error = error or problem
            raise
        finally:
            if self._ranks.is_main:
                self._sum_up(reason(error, stopped_by))
        if self._ranks.is_main and not keeps:
            checkpoint.drop_all(self.folder / CHECKPOINTS)

    def steps(self) -> Iterator[int]:
        """Yield the numbers, from 0, of the remaining steps, until the last or until a signal."""
        while not self._asked_to_stop() and self._done.step < self._config.trainer.steps:
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
        with self._clock(name), self._during(name):
            yield

    def _during(self, name: str) -> AbstractContextManager[None]:
        """Return what holds during a phase."""
        return nullcontext()

    @contextmanager
    def _aside(self, name: str, step: int) -> Iterator[None]:
        """Time work outside a step, in a separate line of timing.jsonl."""
        self.callback.phase(name)
        clock = Clock()
        with clock(name):
            yield
        self._log.write(TIMING, {"step": step, **clock.seconds})

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
            if skipped > self._config.faults.max_skipped:
                raise FloatingPointError(f"{what}; the update was not made")
            self.callback.note(
                f"{what}; it was skipped ({skipped} in a row, at most {self._config.faults.max_skipped})"
            )
        return skipped

    def _write_checkpoint(
        self, score: Callable[[dict[str, Any]], float], more: Callable[[Path], list[Path]] | None = None
    ) -> None:
        """Write a checkpoint, and drop old ones.

        Args:
            score: of an evaluation; the checkpoint with the largest is kept.
            more: writes further files into the checkpoint's folder, and returns them.
        """
        folder = self.folder / CHECKPOINTS
        with self._aside("checkpoint", self._done.step):
            self._log.sync()
            done = replace(self._done, records=self._log.written())
            tensors = self._trained.policy.checkpointed()
            checkpoint.save(folder, done, tensors, self._trained.optimizer, more, self._ranks)
            if self._ranks.is_main:
                scores = {e["step"]: score(e) for e in read_records(self.folder / EVALUATIONS)}
                checkpoint.prune(folder, self._config.checkpoints.keep, scores)


def _tidy(folder: Path) -> None:
    """Remove partial files of a killed process."""
    for path in folder.glob(f"*{SCRATCH}"):
        remove(path)
