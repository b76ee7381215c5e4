"""A run around the algorithm: start, records, evaluations, checkpoints and end."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from drpo.errors import InputError, Interrupted
from drpo.objectives import caution
from drpo.rewards import RewardPool
from drpo.rollout import TransformersEngine
from drpo.train import checkpoint
from drpo.train.callbacks import Callback
from drpo.train.chapters import Chapter, described, write_chapters
from drpo.train.config import Run, load_run, to_json, trains_little
from drpo.train.continued import chapters_of, samples_anew
from drpo.train.evaluate import before_training, score_held_out, summed_up
from drpo.train.log import rollout_records, trained_records, write_json
from drpo.train.metrics import (
    endpoint_metrics,
    filter_metrics,
    metrics_by_turn,
    routing_metrics,
    signal_metrics,
    step_metrics,
    value_metrics,
)
from drpo.train.records import (
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    METRICS,
    ROLLOUTS,
    SUMMARY,
    TIMING,
    read_json,
    read_records,
)
from drpo.train.rollouts import Rollouts
from drpo.train.run_session import RunSession
from drpo.train.score import require_scored
from drpo.train.setup import Components
from drpo.train.summary import summarise
from drpo.train.warned import WarningLog
from drpo.types import Batch, CriticStats, ScoredGroup, StepStats

APART = ("rollout", "reward")
"""The phases without collectives."""


class Session(RunSession):
    """A run of RL in one process; see `RunSession`.

    Args:
        run: the configuration.
        folder: the run's folder.
        components: the objects built from the configuration.
        callback: receives the run's events.
        keep_model: keep the trained model and a checkpoint at the end; else the records alone.
        accept_records: resume although the records differ from those written before the checkpoint.
    """

    command = "drpo train"

    def __init__(
        self,
        run: Run,
        folder: Path,
        components: Components,
        callback: Callback,
        keep_model: bool = True,
        accept_records: bool = False,
    ) -> None:
        super().__init__(run, folder, components, callback, accept_records, keep_model)
        self.run, self.components = run, components
        self.rewards = RewardPool(components.reward, run.rewards.pool)
        self.rollouts = Rollouts(
            run, components.driver, components.held_out, components.ranks, self._apart, components.fits, self.rewards
        )
        self._warnings = WarningLog()

    @property
    def step(self) -> int:
        """Rollouts trained on so far."""
        return self._done.step

    def _begin(self) -> None:
        self._open_folder()
        last = self._read_checkpoint()
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
        engine = self.components.driver.engine
        self._write_environment(
            **({"decoding_step": engine.decoding_step} if isinstance(engine, TransformersEngine) else {})
        )
        write_chapters(self.folder, chapters)  # first: those that are not in config.json are dropped at the next start
        if not _holds(self.folder / CONFIG, to_json(self.run)):  # what is right is not put at risk
            write_json(self.folder / CONFIG, to_json(self.run))

    def _start_processes(self) -> None:
        """Start the processes of the reward and of environments."""
        self._stack.enter_context(self.rewards)
        for environments in (self.components.driver.environments, self.components.held_out_environments):
            if environments is not None:
                self._stack.enter_context(environments)

    def _recorded_config(self) -> Run:
        return load_run(self.folder, trust_remote_code=False)

    def _sum_up(self, reason: str | None) -> None:
        self.summary = summarise(self.folder, self.run, self._stopped_by, self._done.step, reason)
        write_json(self.folder / SUMMARY, self.summary)
        self.rollouts.write_pass_rates(self.folder, self._done.step)
        if self.summary["warning"] is not None:
            self.callback.note(self.summary["warning"])
        self.callback.ended(self.summary)

    def _during(self, name: str) -> AbstractContextManager[None]:
        return self._apart() if name in APART else nullcontext()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Re-raise one rank's exception on all ranks, so that they can still save together."""
        try:
            with self._ranks.reraise_on_all():
                yield
        except Exception:
            self._failed_together = True
            raise

    def gather(self, scored: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Return the groups of a rollout that all ranks have scored.

        Raises:
            InputError: nothing was scored, the reward failed where that is an error, or a curriculum cannot use it.
        """
        groups = self._gathered(scored)
        with self._apart():  # before the update, so that the steps done are saved
            self.rollouts.require_rates(groups)
        return groups

    def _gathered(self, scored: Sequence[ScoredGroup]) -> list[ScoredGroup]:
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

    def evaluate_if_due(self) -> None:
        """Evaluate the untrained policy, and wherever else it is time, if an interruption left it out before."""
        step = self._done.step
        due = step in (0, self.run.trainer.steps) or _due(self.run.evaluation.every, step)
        if due and all(record["step"] != step for record in read_records(self.folder / EVALUATIONS)):
            self._evaluate()

    def _evaluate(self) -> None:
        if not self.components.held_out:
            return
        sampling = replace(self.run.rollout.sampling, samples=self.run.evaluation.samples)
        step = self._done.step
        with suppress(Interrupted), self._aside("evaluation", step):
            driver = self.rollouts.current(self.components.policy.state, version=step)
            driver = replace(driver, environments=self.components.held_out_environments)
            with self._apart(), self._stop.interrupting():
                own = self._ranks.shard(self.components.held_out)
                scored = score_held_out(driver, own, sampling, self.rewards, seed=self.run.seed)
            before, n_before = before_training(read_records(self.folder / EVALUATIONS))
            groups = self._gathered(scored)
            result = summed_up(groups, sampling.samples, step=step, before=before, n_before=n_before)
            self._log.write(EVALUATIONS, {**asdict(result), **endpoint_metrics(groups)})
            self._warnings.add([], [asdict(result)])
            self.callback.evaluated(result)

    def _save(self) -> None:
        self._write_checkpoint(lambda evaluation: evaluation["reward_mean"], self._save_more)

    def _save_more(self, folder: Path) -> list[Path]:
        self.rollouts.save(folder, step=self._done.step)
        return self.components.critic.save(folder) if self.components.critic else []


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _holds(path: Path, record: dict[str, Any]) -> bool:
    try:
        return read_json(path) == record
    except (OSError, InputError):
        return False
