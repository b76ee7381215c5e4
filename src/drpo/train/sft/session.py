"""A run of supervised fine-tuning around its loop: start, records, held-out loss, checkpoints and end."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from drpo.errors import InputError
from drpo.files import SCRATCH, remove, require_own, require_plain
from drpo.seeds import derive
from drpo.train import checkpoint
from drpo.train.callbacks import Callback
from drpo.train.config import to_json
from drpo.train.config.sft import SFTConfig
from drpo.train.lock import locked
from drpo.train.log import Clock, RunLog, environment, peak_memory, write_json
from drpo.train.model_folder import write_model
from drpo.train.records import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    EVALUATIONS,
    FILES,
    METRICS,
    MODEL,
    SUMMARY,
    TIMING,
    read_records,
)
from drpo.train.sft.setup import SFTComponents
from drpo.train.step import per_sequence
from drpo.train.stop import StopRequest
from drpo.train.stored import Progress
from drpo.train.verify import is_finished
from drpo.types import Batch, StepStats


class SFTSession:
    """A run in one process, from its start or last checkpoint to its end or an interruption; only rank 0 writes.

    Args:
        config: with the number of its steps.
        folder: the run's folder.
        components: the objects built from the configuration.
        callback: receives the run's events.
        accept_records: resume although the records differ from those written before the checkpoint.
    """

    def __init__(
        self, config: SFTConfig, folder: Path, components: SFTComponents, callback: Callback, accept_records: bool
    ) -> None:
        self.config, self.folder, self.components, self.callback = config, folder, components, callback
        self.summary: dict[str, Any] = {}
        self._accept_records, self._ranks = accept_records, components.ranks
        self._log = RunLog(folder, writes=components.ranks.is_main)
        self._clock = Clock()
        self._stop, self._stopped_by = StopRequest(callback.note), 0
        self._done, self._between_steps = Progress(), True
        self._stack = ExitStack()

    def __enter__(self) -> "SFTSession":
        """Read the last checkpoint or begin, and take over the signals.

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
                for path in self.folder.glob(f"*{SCRATCH}"):  # partial files of a killed process
                    remove(path)
        torch.manual_seed(derive("global", self.config.seed))
        policy, last = self.components.policy, checkpoint.newest_sound(self.folder / CHECKPOINTS, self.callback.note)
        if last is not None:
            self._done = checkpoint.restore(last, policy.checkpointed(), self.components.optimizer)
        with self._ranks.reraise_on_all():  # all have read what is there
            if self._ranks.is_main and not self._accept_records:
                self._require_records()
        if self._ranks.is_main:
            write_json(self.folder / ENVIRONMENT, environment())
            if self._done.step < self.config.trainer.steps and is_finished(self.folder):
                (self.folder / SUMMARY).unlink()  # of a run that goes on
            write_json(self.folder / CONFIG, to_json(self.config))
            checkpoint.tidy(self.folder / CHECKPOINTS, last)
        self._log.rewind(self._done.step)
        self._ranks.barrier()
        self._stack.enter_context(self._stop)
        config: Any = self.config  # callbacks write a configuration down, of whichever kind
        self.callback.started(config, self.folder, self._done.step)

    def _require_records(self) -> None:
        """Refuse records that are not what was written before the checkpoint."""
        try:
            self._log.require(self._done.records)
        except InputError as error:
            again = f"drpo sft --resume {self.folder} --accept-records"
            raise InputError(f"{error}; put back what was written, or go on with what is there: {again}") from None

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
                self.callback.note(f"what was done could not be saved: {problem}")

    def _end(self, error: BaseException | None) -> None:
        alone = self._ranks.size == 1  # else the others may be elsewhere
        if error is None or (alone and self._between_steps and self._done.step > 0):
            self._save()
        if error is None and self._done.step >= self.config.trainer.steps:
            write_model(self.components.policy, self.components.tokenizer, self.folder / MODEL, self._ranks)
        if self._ranks.is_main:
            self.summary = summarise_sft(self.folder, self.config, self._stopped_by or None, self._done.step)
            write_json(self.folder / SUMMARY, self.summary)
            self.callback.ended(self.summary)

    def steps(self) -> Iterator[int]:
        """Yield the numbers, from 0, of the remaining steps, until the last or until a signal on any rank."""
        while self._done.step < self.config.trainer.steps:
            self._stopped_by = self._ranks.all_reduce_max(self._stop.signal or 0)
            if self._stopped_by:
                return
            self._clock = Clock()
            yield self._done.step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step and report its start; during the update the weights are between two steps."""
        self.callback.phase(name)
        self._between_steps = name != "update"
        with self._clock(name):
            yield

    @contextmanager
    def _aside(self, name: str) -> Iterator[None]:
        """Time work beside the updates, in a line of timing.jsonl of its own."""
        self.callback.phase(name)
        clock = Clock()
        with clock(name):
            yield
        self._log.write(TIMING, {"step": self._done.step, **clock.seconds})

    def finish_step(self, batch: Batch, stats: StepStats) -> None:
        """Record the step that the loop has just done; evaluate and save where it is time.

        Raises:
            FloatingPointError: too many updates in a row had a gradient that is not finite.
        """
        skipped = self._skipped(stats)
        self._done = replace(
            self._done,
            step=self._done.step + 1,
            updates=self._done.updates + 1,
            tokens=self._done.tokens + batch.n_tokens,
            skipped=skipped,
        )
        self._between_steps = True
        step, trainer = self._done.step, self.config.trainer
        metrics = {
            "step": step,
            "nll": stats.loss,
            "entropy": float(stats.token_stats.entropy.mean()),
            "grad_norm": stats.grad_norm,
            "learning_rate": stats.learning_rate,
            "conversations": batch.n_episodes,
            "trained_tokens": batch.n_tokens,
            "epoch": step * trainer.batch / len(self.components.examples.train),
            **({} if stats.taken else {"skipped_updates": 1}),
        }
        if step == trainer.steps or (trainer.eval_every and step % trainer.eval_every == 0):
            metrics |= self._evaluate()
        if self._ranks.is_main:
            self._log.write(METRICS, metrics)
            self._log.write(TIMING, {"step": step, **self._clock.seconds})
            self.callback.stepped(step, metrics, self._clock.seconds, ())
        every = self.config.checkpoints.every
        if step < trainer.steps and (not stats.taken or (every and step % every == 0)):
            self._save()

    def _skipped(self, stats: StepStats) -> int:
        """The updates in a row, up to this one, that were not made."""
        if stats.taken:
            return 0
        skipped, most = self._done.skipped + 1, self.config.faults.max_skipped
        what = f"the gradient's norm is {stats.grad_norm} (loss {stats.loss})"
        if skipped > most:
            raise FloatingPointError(f"{what}; the update was not made")
        self.callback.note(f"{what}; the update was skipped ({skipped} in a row, at most {most})")
        return skipped

    def evaluate_before(self) -> None:
        """Take the held-out loss of the untrained model, unless it is recorded."""
        if self._done.step == 0 and not read_records(self.folder / EVALUATIONS):
            self._evaluate()

    def _evaluate(self) -> dict[str, float]:
        """Record the held-out loss, and return it for the step's metrics; nothing where nothing is held out."""
        held_out, step = self.components.examples.held_out, self._done.step
        if not held_out:
            return {}
        with self._aside("evaluation"):
            policy = self.components.policy
            with torch.no_grad():
                logp = per_sequence(
                    policy,
                    held_out,
                    lambda micro: policy(micro)[0],
                    self.config.trainer.micro_batch_tokens,
                    self._ranks,
                )
        loss = -float(torch.cat(logp).double().mean())
        self._log.write(EVALUATIONS, {"step": step, "nll": loss, "conversations": len(held_out)})
        if self._ranks.is_main:
            self.callback.note(f"held-out loss after {step} steps: {loss:.4f} nats a token")
        return {"held_out_nll": loss}

    def _save(self) -> None:
        with self._aside("checkpoint"):
            self._log.sync()
            folder, tensors = self.folder / CHECKPOINTS, self.components.policy.checkpointed()
            done = replace(self._done, records=self._log.written())
            checkpoint.save(folder, done, tensors, self.components.optimizer, None, self._ranks)
            if self._ranks.is_main:
                scores = {e["step"]: -e["nll"] for e in read_records(self.folder / EVALUATIONS)}
                checkpoint.prune(folder, self.config.checkpoints.keep, scores)


def summarise_sft(folder: Path, config: SFTConfig, stopped_by: int | None, done: int) -> dict[str, Any]:
    """Return what summary.json of a run of supervised fine-tuning says.

    Args:
        folder: the run's folder.
        config: its configuration.
        stopped_by: number of the signal that ended it early, or None.
        done: steps of its last checkpoint.
    """
    metrics, evaluations = read_records(folder / METRICS), read_records(folder / EVALUATIONS)
    steps = max(done, metrics[-1]["step"] if metrics else 0)
    seconds: dict[str, float] = {}
    for record in read_records(folder / TIMING):
        for phase, spent in record.items():
            if phase != "step":
                seconds[phase] = seconds.get(phase, 0.0) + spent
    return {
        "name": config.name,
        "kind": config.kind,
        "model": config.model.name,
        "seed": config.seed,
        "finished": steps >= config.trainer.steps,
        "stopped_by_signal": stopped_by,
        "steps": steps,
        "nll": metrics[-1]["nll"] if metrics else None,
        "held_out_before": next((e["nll"] for e in evaluations if e["step"] == 0), None),
        "held_out_after": next((e["nll"] for e in evaluations if e["step"] == steps > 0), None),
        "trained_tokens": sum(m["trained_tokens"] for m in metrics),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
    }
