"""The configuration of supervised fine-tuning -> the objects that its loop works with."""

import logging
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from drpo.model.activations import checkpoint_activations
from drpo.model.policy import Policy
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.rollout import PromptLimits
from drpo.train.config.sft import SFTConfig
from drpo.train.memory import StepShape, fits_with_all_activations
from drpo.train.setup import make_optimizer, make_policy, model_in_place
from drpo.train.sft.data import Examples, read_examples, updates_of_epoch

log = logging.getLogger("drpo")


@dataclass(frozen=True, eq=False)
class SFTComponents:
    """The objects that supervised fine-tuning works with.

    Args:
        policy: the model in training.
        optimizer: over its trainable parameters.
        tokenizer: the model's.
        examples: the conversations.
        ranks: the processes that train together, and this one's number.
    """

    policy: Policy
    optimizer: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    ranks: Ranks = SINGLE_PROCESS


def build_sft(config: SFTConfig, ranks: Ranks = SINGLE_PROCESS) -> tuple[SFTConfig, SFTComponents]:
    """Load the model, read the data, and return the configuration with its number of steps, and what the loop needs.

    Args:
        config: `trainer.steps` of 0 is as many as the epochs take.
        ranks: the processes that train together.

    Raises:
        InputError: the model, or the data, cannot be used.
    """
    model, tokenizer = model_in_place(config.model, (), ranks)
    limits = PromptLimits.of(model)
    examples = read_examples(config.data, tokenizer, limits.positions if limits.fixed else None)
    if ranks.is_main:
        log.info("%s: %s", config.data.path, examples)
    config, trainer = with_its_steps(config, len(examples.train)), config.trainer
    policy = make_policy(config.model, model, 1.0, config.seed, ranks, trainer.shard)
    optimizer = make_optimizer(config.optimizer, policy, config.seed)
    if trainer.checkpoint_activations == "on" or (
        trainer.checkpoint_activations == "auto"
        and not fits_with_all_activations(policy, optimizer, None, _largest_step(config, examples), ranks)
    ):
        checkpoint_activations(policy.model)
    return config, SFTComponents(policy, optimizer, tokenizer, examples, ranks)


def with_its_steps(config: SFTConfig, conversations: int) -> SFTConfig:
    """Return the configuration with the number of its updates, which the epochs say where it has none.

    Args:
        config: of the run.
        conversations: that are trained on.
    """
    trainer = config.trainer
    return config.with_steps(
        trainer.steps or max(1, round(trainer.epochs * updates_of_epoch(conversations, trainer.batch)))
    )


def _largest_step(config: SFTConfig, examples: Examples) -> StepShape:
    """The shape of an update whose conversations are all as long as the longest."""
    sequences = [s for group in examples.train for s in group.sequences]
    return StepShape(
        prompt_tokens=max(len(s.prompt_ids) for s in sequences),
        new_tokens=max(len(s.token_ids) for s in sequences),
        prompts=config.trainer.batch,
        samples=1,
        micro_batch_tokens=config.trainer.micro_batch_tokens,
    )
