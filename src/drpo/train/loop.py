"""The algorithm, top to bottom. `session.py` writes records, evaluates and saves."""

from pathlib import Path
from typing import Any

from drpo.batch import make_batches
from drpo.train.callbacks import Callback, CallbackList, NullCallback
from drpo.train.config import Run, learning_rate
from drpo.train.score import score
from drpo.train.session import Session
from drpo.train.setup import Components
from drpo.train.step import update_policy
from drpo.train.warm_up import build_started, started


def train(
    run: Run,
    folder: Path | str,
    callback: Callback | None = None,
    components: Components | None = None,
    *,
    keep_model: bool = True,
    accept_records: bool = False,
) -> dict[str, Any]:
    """Train from the last checkpoint in `folder`, or from the start, and return the content of summary.json.

    Args:
        run: the whole configuration.
        folder: the run's folder; created if missing.
        callback: receives the run's events, or None. Its exceptions are logged and do not end the run.
        components: replace those built from the configuration, for tests and special rollouts; with a warm-up, from
            that with the model that it left.
        keep_model: keep the trained model and a checkpoint at the end; else the records alone.
        accept_records: resume although the records differ from those written before the checkpoint; else raise.

    Raises:
        InputError: an argument or a file cannot be used. Finished work stays in the folder.
        FloatingPointError: more than `run.faults.max_skipped` gradients in a row were not finite.
    """
    callbacks = CallbackList(callback or NullCallback())
    if components is None:
        built = build_started(run, Path(folder), callbacks, accept_records)
        if not isinstance(built, Components):
            return built
        components = built
    started(run, Path(folder))  # or else its warm-up is not done
    policy, optimizer, critic, ranks = components.policy, components.optimizer, components.critic, components.ranks
    objective, max_grad_norm, auxiliary = run.objective.loss, run.optimizer.max_grad_norm, components.auxiliary
    with Session(run, Path(folder), components, callbacks, keep_model, accept_records) as session:
        session.evaluate_if_due()
        for step in session.steps():
            with session.phase("sync"):
                session.rollouts.refresh(policy.state, version=step)
            with session.phase("rollout"):
                rollout = session.rollouts.take(step)  # this rank's; alone: all
            with session.phase("reward"):
                scored = rollout.scored or score(rollout.problems, rollout.episodes, session.rewards)
            groups = session.gather(scored)  # of all ranks
            with session.phase("update"):
                if components.first_pass:
                    groups = components.first_pass.add_to(groups)  # the experts that all updates use
                for logp_pass in components.logp_passes:
                    groups = logp_pass.add_to(groups)  # of the proximal policy or the reference, for all updates
                if components.reference_reward:
                    groups = components.reference_reward.add_to(groups)  # a reward per token
                if components.overlong:
                    groups = components.overlong(groups)  # a penalty for length, or a mask on what was cut
                values = critic.values(groups) if critic else None
                credits = components.credit(groups, values)  # an advantage for every sampled token
                batches = make_batches(groups, credits, components.batch_config)  # one per update; weights fixed here
                rates = [learning_rate(run, step, i) for i in range(len(batches))]
                stats = [
                    update_policy(policy, optimizer, batch, objective, rate, max_grad_norm, auxiliary, ranks)
                    for batch, rate in zip(batches, rates, strict=True)
                ]
                critic_stats = critic.train(batches) if critic else []
            session.finish_step(groups, batches, stats, critic_stats)
    return session.summary
