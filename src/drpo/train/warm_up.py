"""The warm-up of a run: the model answers training problems, and is fine-tuned on its right answers, before RL.

Its folder is `warm_up/` in the run's: a run of fine-tuning, with every answer in answers.jsonl and their counts in
tally.json. RL begins with its model. It trains on the sampled token ids as answers.jsonl has them, so that a resumed
process trains on the same tokens.
"""

import gc
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from drpo.errors import InputError, Interrupted, as_typed, counted
from drpo.files import require_own, require_plain
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.rewards import RewardPool
from drpo.train import checkpoint
from drpo.train.best_of import BestOf
from drpo.train.callbacks import Callback, NullCallback
from drpo.train.config import CheckpointConfig, OptimizerConfig, Run, configure, flat_json, to_json
from drpo.train.config.sft import ADAPTER_RATE, FULL_RATE, ConversationConfig, SFTConfig, SFTTrainerConfig
from drpo.train.ending import reason
from drpo.train.evaluate import score_held_out, summed_up
from drpo.train.lock import locked
from drpo.train.log import Clock, RunLog, environment, rollout_records, write_json
from drpo.train.optim import AdamW, Linear
from drpo.train.origin import ORIGIN, START
from drpo.train.own_answers import (
    Selection,
    append,
    as_example,
    problems_of_rollouts,
    require_written,
    take_recorded,
)
from drpo.train.records import CHECKPOINTS, CONFIG, ENVIRONMENT, MODEL, SUMMARY, TIMING
from drpo.train.score import require_scored, score
from drpo.train.setup import Components, build, make_optimizer
from drpo.train.sft.data import Examples
from drpo.train.sft.loop import fine_tune
from drpo.train.sft.setup import SFTComponents, with_its_steps
from drpo.train.stop import StopRequest
from drpo.train.summary import summarise
from drpo.train.warmed import ANSWERS, BEFORE, TALLY, WARM_UP, Tally, is_warm, outcome, read_tally
from drpo.types import Problem, ScoredGroup


def warms_up(run: Run, folder: Path) -> bool:
    """Return whether a run's warm-up is still to do.

    Args:
        run: the configuration.
        folder: of the run; it may be new.
    """
    return run.warm_up is not None and not is_warm(folder)


def placed(run: Run, folder: Path) -> Run:
    """Return a run with the model that `--from` copied into its folder, where that is now: it may have been moved.

    Args:
        run: the configuration; a run without such a model is returned as it is.
        folder: of the run.
    """
    return configure(run, model=str(folder / START)) if (folder / ORIGIN).is_file() else run


def started(run: Run, folder: Path) -> Run:
    """Return a run with the model that RL begins with: after a warm-up, the warm-up's.

    Args:
        run: the configuration.
        folder: of the run.

    Raises:
        InputError: its warm-up is not done.
    """
    if warms_up(run, folder):
        raise InputError(f"{folder}: its warm-up is not done; `drpo train --resume {as_typed(folder)}` goes on with it")
    return placed(run, folder) if run.warm_up is None else configure(run, model=str(folder / WARM_UP / MODEL))


def build_started(
    run: Run, folder: Path, callback: Callback, accept_records: bool = False, ranks: Ranks = SINGLE_PROCESS
) -> Components | dict[str, Any]:
    """Build the components of a run's loop; first do its warm-up, unless it is done.

    Args:
        run, folder, callback, accept_records: as for `warm_up`.
        ranks: the processes that train together.

    Returns:
        The components; or the content of summary.json if a signal ended the warm-up.

    Raises:
        InputError: as `build` and `warm_up`.
    """
    if not warms_up(run, folder):
        return build(started(run, folder), ranks)
    if ranks.size > 1:
        raise InputError(
            f"warm_up={flat_json(run)['warm_up']}: one process does it, and here are {ranks.size}; begin without "
            "torchrun and go on with --resume in several, or begin in several with --model RUN/warm_up/model"
        )
    base = build(placed(run, folder), ranks)
    engine = base.driver.engine
    try:
        stopped = warm_up(run, folder, base, callback, accept_records)
        del base
        gc.collect()  # reference cycles hold the model
        if stopped is None:
            return build(started(run, folder), ranks, engine)
    except BaseException:
        engine.close()
        raise
    engine.close()
    return stopped


@dataclass(frozen=True, eq=False)
class _Work:
    """The arguments of a warm-up; see `warm_up`."""

    run: Run
    rule: BestOf
    folder: Path
    components: Components
    callback: Callback
    stop: StopRequest

    @property
    def path(self) -> Path:
        """Path of answers.jsonl."""
        return self.folder / WARM_UP / ANSWERS

    def require_going(self) -> None:
        """Raise if a signal came.

        Raises:
            Interrupted: a signal came.
        """
        if self.stop.signal is not None:
            raise Interrupted


def warm_up(
    run: Run, folder: Path, components: Components, callback: Callback, accept_records: bool = False
) -> dict[str, Any] | None:
    """Sample answers and fine-tune the model on the right ones; continues an interrupted warm-up.

    Args:
        run: the configuration, with a warm-up.
        folder: the run's; created if missing.
        components: built from the configuration in one process; the policy is trained.
        callback: receives phases and notes.
        accept_records: go on although the records of the fine-tuning differ from those written.

    Returns:
        None when done; the content of summary.json if a signal ended it.

    Raises:
        InputError: another process trains this run, no answer is right, or answers.jsonl was changed.
    """
    assert run.warm_up is not None
    (folder / WARM_UP).mkdir(parents=True, exist_ok=True)
    require_own(folder / WARM_UP)
    require_plain(folder / WARM_UP / ANSWERS)
    with locked(folder), StopRequest(callback.note) as stop:
        write_json(folder / CONFIG, to_json(run))  # which `drpo train --resume` reads
        write_json(folder / ENVIRONMENT, environment())
        work = _Work(run, run.warm_up, folder, components, callback, stop)
        try:
            examples = _answers(work)
            summary = _fine_tune(work, examples, accept_records)
        except Interrupted:
            return _stopped(work, stop.signal)
        except BaseException as error:
            with suppress(Exception):  # the error is the one to raise
                _stopped(work, stop.signal, error)
            raise
        if not is_warm(folder):
            return _stopped(work, summary["stopped_by_signal"])
        if (folder / WARM_UP / CHECKPOINTS).exists():
            checkpoint.drop_all(folder / WARM_UP / CHECKPOINTS)
        callback.note(f"warm-up: {outcome(folder)}")
    return None


def _stopped(work: _Work, signal: int | None, error: BaseException | None = None) -> dict[str, Any]:
    """Write the summary of a run that ended in its warm-up."""
    summary = summarise(work.folder, work.run, signal, reason=reason(error, signal))
    write_json(work.folder / SUMMARY, summary)
    work.callback.ended(summary)
    return summary


def _answers(work: _Work) -> list[ScoredGroup]:
    """Sample the missing answers, evaluate the model, and return the answers to learn from.

    Raises:
        Interrupted: a signal came.
        InputError: no answer is right, or answers.jsonl was changed.
    """
    before = read_tally(work.folder)
    if before is not None:
        require_written(work.path, before)
    wanted = problems_of_rollouts(work.run, work.rule, work.components)
    selection = Selection(work.rule, sum(map(len, wanted)))
    done = take_recorded(work.path, wanted, work.rule.samples, selection)
    if done < len(wanted):
        _sample(work, wanted, done, selection)
    tally = selection.tally(work.path)
    write_json(work.folder / WARM_UP / TALLY, asdict(tally))
    _require_some(work.run, work.rule, tally)
    if work.components.held_out and not (work.folder / WARM_UP / BEFORE).exists():
        _evaluate(work)
    return [as_example(record, number) for number, record in enumerate(selection.learnt)]


def _sample(work: _Work, wanted: Sequence[Sequence[Problem]], done: int, selection: Selection) -> None:
    """Sample, score and record the missing rollouts."""
    sampling = replace(work.run.rollout.sampling, samples=work.rule.samples, top_logprobs=0)
    driver, log = work.components.driver, RunLog(work.folder / WARM_UP)
    driver.engine.load_weights(work.components.policy.state(), 0)
    pool = RewardPool(work.components.reward, work.run.rewards.pool)
    with pool, driver.environments or nullcontext():
        for step in range(done, len(wanted)):
            work.require_going()
            work.callback.phase("answers")
            clock = Clock()
            with clock("rollout"):
                episodes = driver.run(wanted[step], sampling, ("warm-up", work.run.seed, step))
            with clock("reward"):
                groups = score(wanted[step], episodes, pool)
            require_scored(groups, work.run.rewards.pool)
            records = list(rollout_records(step + 1, groups, {}))
            append(work.path, records)
            log.write(TIMING, {"step": 0, **clock.seconds})
            selection.add(records)
            tally = selection.tally(work.path)
            write_json(work.folder / WARM_UP / TALLY, asdict(tally))
            if _is_tenth(step + 1, len(wanted)):
                work.callback.note(f"warm-up: {tally}")
    work.require_going()


def _evaluate(work: _Work) -> None:
    """Evaluate the model before it learns, as the evaluations of RL do.

    Raises:
        Interrupted: a signal came.
    """
    run, components = work.run, work.components
    work.callback.phase("evaluation")
    sampling = replace(run.rollout.sampling, samples=run.evaluation.samples)
    environments = components.held_out_environments
    driver = replace(components.driver, environments=environments)
    driver.engine.load_weights(components.policy.state(), 0)
    clock, pool = Clock(), RewardPool(components.reward, run.rewards.pool)
    with work.stop.interrupting(), clock("evaluation"), pool, environments or nullcontext():
        groups = score_held_out(driver, components.held_out, sampling, pool, seed=run.seed)
    require_scored(groups, run.rewards.pool)
    result = summed_up(groups, sampling.samples, step=0)
    write_json(work.folder / WARM_UP / BEFORE, asdict(result))
    RunLog(work.folder / WARM_UP).write(TIMING, {"step": 0, **clock.seconds})
    work.callback.note(f"before the warm-up: held-out reward {result.reward_mean:.3f}")


def _require_some(run: Run, rule: BestOf, tally: Tally) -> None:
    """Require an answer to learn from.

    Raises:
        InputError: there is none; the message says why, and what to do.
    """
    if tally.learnt:
        return
    asked = f"warm_up={flat_json(run)['warm_up']}: of {tally.samples} answers to each of {tally.problems:,} problems"
    given = (
        f"fine-tune it on given answers, drpo sft my.jsonl --model {as_typed(run.model.name)} --out runs/warm, and "
        "train with --model runs/warm"
    )
    if tally.cut:
        raise InputError(
            f"{asked} no whole one is right, and the limit of tokens cut {counted(tally.cut, 'right one')}, which "
            f"shows the model no end of an answer; set --sampling.max-new-tokens, or {given}"
        )
    less = f"best_of({rule.samples}, right=...) takes less than {rule.right:g}; or " if tally.reward_max > 0 else ""
    raise InputError(
        f"{asked} none is right (the largest reward is {tally.reward_max:.3g}, {rule.right:g} is right), so the model "
        f"has nothing of its own to learn from; {less}{given}"
    )


def fine_tuning(run: Run, rule: BestOf, answers: int) -> SFTConfig:
    """Return the configuration of a warm-up's fine-tuning.

    Args:
        run: the configuration of the run.
        rule: of its warm-up.
        answers: number of answers to learn from.
    """
    usual = ADAPTER_RATE if run.model.lora_rank else FULL_RATE
    config = SFTConfig(
        name=run.name,
        model=run.model,
        data=ConversationConfig(ANSWERS, holdout=0),
        optimizer=OptimizerConfig(AdamW(rule.learning_rate or usual), Linear(), run.optimizer.max_grad_norm),
        trainer=SFTTrainerConfig(
            epochs=rule.epochs, batch=rule.batch, micro_batch_tokens=run.trainer.micro_batch_tokens
        ),
        checkpoints=CheckpointConfig(run.checkpoints.every, keep=1),
        faults=run.faults,
        seed=run.seed,
    )
    return with_its_steps(config, answers)


def _fine_tune(work: _Work, examples: Sequence[ScoredGroup], accept_records: bool) -> dict[str, Any]:
    """Fine-tune the policy, write it as the warm-up's model, and return the summary."""
    config, policy = fine_tuning(work.run, work.rule, len(examples)), work.components.policy
    policy.temperature = 1.0  # of the likelihood, as in any fine-tuning
    parts = SFTComponents(
        policy,
        make_optimizer(config.optimizer, policy, config.seed),
        work.components.tokenizer,
        Examples(tuple(examples), (), 0, 0),
        work.components.ranks,
    )
    return fine_tune(
        config,
        work.folder / WARM_UP,
        _Aside(work.callback, config.trainer.steps),
        parts.ranks,
        parts,
        accept_records=accept_records,
        resumed_by=f"drpo train --resume {as_typed(work.folder)}",
    )


class _Aside(NullCallback):
    """Passes phases and notes of the fine-tuning to a run's callback; not its steps, which would count as RL's.

    Args:
        callback: of the run.
        steps: updates in all.
    """

    def __init__(self, callback: Callback, steps: int) -> None:
        self._callback, self._steps = callback, steps

    def phase(self, name: str) -> None:
        """Pass it on."""
        self._callback.phase(name)

    def note(self, text: str) -> None:
        """Pass it on."""
        self._callback.note(text)

    def stepped(self, step: int, metrics: Mapping[str, Any], *rest: object) -> None:
        """Note every tenth of the updates."""
        if _is_tenth(step, self._steps):
            self._callback.note(f"warm-up: update {step} of {self._steps}, loss {metrics['nll']:.3f}")


def _is_tenth(done: int, steps: int) -> bool:
    """Return whether another tenth is done.

    Example:
        >>> [i for i in range(1, 41) if _is_tenth(i, 40)]
        [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    """
    return 10 * done // steps > 10 * (done - 1) // steps
