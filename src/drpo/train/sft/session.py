"""A run of supervised fine-tuning around its loop: start, records, held-out loss, checkpoints and end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from drpo.train import checkpoint
from drpo.train.callbacks import Callback
from drpo.train.chapters import described, write_chapters
from drpo.train.config import to_json
from drpo.train.config.sft import SFTConfig, load_sft
from drpo.train.log import peak_memory, write_json
from drpo.train.records import (
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    METRICS,
    SUMMARY,
    TIMING,
    read_records,
)
from drpo.train.run_session import RunSession
from drpo.train.sft.continued import chapters_of
from drpo.train.sft.data import updates_of_epoch
from drpo.train.sft.setup import SFTComponents
from drpo.train.step import per_sequence
from drpo.types import Batch, StepStats


class SFTSession(RunSession):
    """A run of supervised fine-tuning in one process; see `RunSession`.

    Args:
        config: with the number of its steps.
        folder: the run's folder.
        components: the objects built from the configuration.
        callback: receives the run's events.
        accept_records: resume although the records differ from those written before the checkpoint.
        resumed_by: the command that goes on with it; None for that of a run by itself.
    """

    command = "drpo sft"

    def __init__(
        self,
        config: SFTConfig,
        folder: Path,
        components: SFTComponents,
        callback: Callback,
        accept_records: bool,
        resumed_by: str | None = None,
    ) -> None:
        super().__init__(config, folder, components, callback, accept_records)
        self.config, self.components = config, components
        self._resume = resumed_by

    def _resumed_by(self) -> str:
        return self._resume or super()._resumed_by()

    def _begin(self) -> None:
        self._open_folder()
        last = self._read_checkpoint()
        chapters = chapters_of(self.folder, self.config, self._done.step, bool(self.components.examples.held_out))
        with self._ranks.reraise_on_all():  # all have read what is there
            self._require_records(last)
        if self._ranks.is_main:
            self._write_environment()
            write_chapters(self.folder, chapters)
            write_json(self.folder / CONFIG, to_json(self.config))
            checkpoint.tidy(self.folder / CHECKPOINTS, last)
        self._log.rewind(self._done.step)
        self._ranks.barrier()
        self._stack.enter_context(self._stop)
        config: Any = self.config  # callbacks write a configuration down, of whichever kind
        self.callback.started(config, self.folder, self._done.step)
        if chapters and chapters[-1].step == self._done.step:
            self.callback.note(described(chapters[-1]))

    def _recorded_config(self) -> SFTConfig:
        return load_sft(self.folder)

    def _sum_up(self, reason: str | None) -> None:
        self.summary = summarise_sft(self.folder, self.config, self._stopped_by, self._done.step, reason)
        write_json(self.folder / SUMMARY, self.summary)
        self.callback.ended(self.summary)

    def finish_step(self, batch: Batch, stats: StepStats) -> None:
        """Record the step that the loop has just done; evaluate and save where it is time.

        Raises:
            FloatingPointError: too many updates in a row had a gradient that is not finite.
        """
        done = replace(
            self._done,
            step=self._done.step + 1,
            updates=self._done.updates + 1,
            tokens=self._done.tokens + batch.n_tokens,
            skipped=self._count_skipped("policy", self._done.skipped, [stats]),
        )
        step, trainer = done.step, self.config.trainer
        metrics = {
            "step": step,
            "nll": stats.loss,
            "entropy": float(stats.token_stats.entropy.mean()),
            "grad_norm": stats.grad_norm,
            "learning_rate": stats.learning_rate,
            "conversations": batch.n_episodes,
            "trained_tokens": batch.n_tokens,
            "epoch": step / updates_of_epoch(len(self.components.examples.train), trainer.batch),
            **({} if stats.taken else {"skipped_updates": 1}),
        }
        if step == trainer.steps or (trainer.eval_every and step % trainer.eval_every == 0):
            metrics |= self._evaluate(step)
        if self._ranks.is_main:
            self._log.write(METRICS, metrics)
            self._log.write(TIMING, {"step": step, **self._clock.seconds})
        self._done, self._between_steps = done, True  # from here on a checkpoint may claim the step
        if self._ranks.is_main:
            self.callback.stepped(step, metrics, self._clock.seconds, ())
        every = self.config.checkpoints.every
        if step < trainer.steps and (not stats.taken or (every and step % every == 0)):
            self._save()

    def evaluate_before(self) -> None:
        """Take the held-out loss of the untrained model, unless it is recorded."""
        if self._done.step == 0 and not read_records(self.folder / EVALUATIONS):
            self._evaluate(0)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Record the held-out loss after a step, and return it for its metrics; nothing where nothing is held out."""
        held_out = self.components.examples.held_out
        if not held_out:
            return {}
        with self._aside("evaluation", step):
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
        self._write_checkpoint(lambda evaluation: -evaluation["nll"])


def summarise_sft(
    folder: Path, config: SFTConfig, stopped_by: int | None, done: int, reason: str | None = None
) -> dict[str, Any]:
    """Return what summary.json of a run of supervised fine-tuning says.

    Args:
        folder: the run's folder.
        config: its configuration.
        stopped_by: number of the signal that ended it early, or None.
        done: steps of its last checkpoint.
        reason: why it ended early, or None.
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
        "finished": steps >= config.trainer.steps and reason is None,
        "stopped_by_signal": stopped_by,
        "reason": reason,
        "steps": steps,
        "nll": metrics[-1]["nll"] if metrics else None,
        "held_out_before": next((e["nll"] for e in evaluations if e["step"] == 0), None),
        "held_out_after": next((e["nll"] for e in evaluations if e["step"] == steps > 0), None),
        "trained_tokens": sum(m["trained_tokens"] for m in metrics),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
    }
