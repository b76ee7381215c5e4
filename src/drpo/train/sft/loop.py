"""Supervised fine-tuning, top to bottom. `session.py` writes records, evaluates and saves."""

from pathlib import Path
from typing import Any

from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.train.callbacks import Callback, CallbackList, NullCallback
from drpo.train.config.sft import SFTConfig
from drpo.train.sft.data import at_step
from drpo.train.sft.likelihood import NegativeLogLikelihood, likelihood_batch
from drpo.train.sft.session import SFTSession
from drpo.train.sft.setup import SFTComponents, build_sft
from drpo.train.step import update_policy


def fine_tune(
    config: SFTConfig,
    folder: Path | str,
    callback: Callback | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    components: SFTComponents | None = None,
    *,
    accept_records: bool = False,
    resumed_by: str | None = None,
) -> dict[str, Any]:
    """Train on conversations from the last checkpoint in `folder`, or from the start; return what summary.json says.

    Args:
        config: the whole configuration.
        folder: the run's folder; created if missing.
        callback: receives the run's events, or None. Its exceptions are logged and do not end the run.
        ranks: the processes that train together.
        components: replace those built from the configuration, whose `trainer.steps` is then the number of updates.
        accept_records: resume although the records differ from those written before the checkpoint; else raise.
        resumed_by: the command that goes on with the run, for messages; None for `drpo sft --resume`.

    Raises:
        InputError: an argument or a file cannot be used. Finished work stays in the folder.
        FloatingPointError: more than `faults.max_skipped` gradients in a row were not finite.
    """
    if components is None:
        config, components = build_sft(config, ranks)
    policy, trainer = components.policy, config.trainer
    callbacks = CallbackList(callback or NullCallback())
    with SFTSession(config, Path(folder), components, callbacks, accept_records, resumed_by) as session:
        session.evaluate_before()
        for step in session.steps():
            with session.phase("update"):
                groups = at_step(components.examples.train, trainer.batch, step, config.seed)
                batch = likelihood_batch(groups, trainer.micro_batch_tokens, policy.shares_prompts, ranks.size)
                stats = update_policy(
                    policy,
                    components.optimizer,
                    batch,
                    NegativeLogLikelihood(),
                    config.learning_rate(step),
                    config.optimizer.max_grad_norm,
                    ranks=ranks,
                )
            session.finish_step(batch, stats)
    return session.summary
