"""The trained model of a run, written in transformers' format."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from drpo.model.policy import Policy
from drpo.model.saving import probe, save_model
from drpo.ranks import Ranks
from drpo.train.stored import write_sums


def write_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, ranks: Ranks) -> None:
    """Write a policy as a model's folder, with the checksums of its files, and verify it; called on every rank.

    Args:
        policy: the trained model.
        tokenizer: its tokenizer, with the chat template.
        folder: to write.
        ranks: the processes that train together; rank 0 writes.
    """
    logits, trained = policy.logits(probe(policy.model)), [policy.plain()]  # all ranks together
    if ranks.is_main:
        save_model(trained.pop(), tokenizer, folder, logits)
        write_sums(folder)
