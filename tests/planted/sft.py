"""Mistakes in what supervised fine-tuning trains on, and in how its runs go on."""

from dataclasses import replace
from typing import Any

from planted import Replacement

HERE = "tests/test_sft.py::"
TOKENS = f"{HERE}test_what_is_trained_is_what_the_template_makes_token_for_token"
NO_TEMPLATE = f"{HERE}test_without_a_template_turns_end_with_eos_and_go_on_as_in_a_rollout"
LOSS = f"{HERE}test_loss_and_gradient_are_those_of_transformers"
ORDER = f"{HERE}test_every_conversation_is_trained_on_before_one_is_again"
RESUMED = f"{HERE}test_resumed_is_one_run_bit_for_bit"


def _off_by_one(right: Any) -> Any:
    """Each position is trained on where the one before it should be."""

    def sequence(pieces: Any) -> Any:
        made = right(pieces)
        return replace(made, sampled=made.sampled.roll(1))

    return sequence


def _users_too(right: Any) -> Any:
    return lambda pieces: right([pieces[0], *((ids, True) for ids, _ in pieces[1:])])


def _unended(right: Any) -> Any:
    return lambda *arguments: right(*arguments)[:-1]


def _two_bos(right: Any) -> Any:
    def encode_prompt(tokenizer: Any, *rest: Any) -> Any:
        import torch

        ids = right(tokenizer, *rest)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return torch.cat([torch.tensor(bos, dtype=torch.int64), ids])

    return encode_prompt


REPLACEMENTS = (
    Replacement(
        "in supervised fine-tuning the mask of the trained tokens is off by one",
        "drpo.rollout.trained_turns:_sequence",
        _off_by_one,
        (TOKENS, NO_TEMPLATE),
    ),
    Replacement(
        "supervised fine-tuning trains on what users say between the turns",
        "drpo.rollout.trained_turns:_sequence",
        _users_too,
        (TOKENS, NO_TEMPLATE),
    ),
    Replacement(
        "supervised fine-tuning leaves out the token that ends a turn",
        "drpo.rollout.trained_turns:_ended",
        _unended,
        (TOKENS, NO_TEMPLATE),
    ),
    Replacement(
        "a conversation begins with two BOS tokens",
        "drpo.rollout.trained_turns:encode_prompt",
        _two_bos,
        (f"{HERE}test_there_is_one_bos",),
    ),
    Replacement(
        "a text of a conversation may end a turn",
        "drpo.rollout.trained_turns:hide_forgeries",
        lambda right: lambda tokenizer, messages: (list(messages), {}),
        (f"{HERE}test_a_text_cannot_end_a_turn_or_begin_another",),
    ),
    Replacement(
        "supervised fine-tuning gives conversations the same weight, not tokens",
        "drpo.train.sft.likelihood:token_mean",
        lambda right: lambda keep, sequence: __import__("drpo.reductions").reductions.sequence_mean(keep, sequence),
        (LOSS,),
    ),
    Replacement(
        "every step of supervised fine-tuning draws from a new order",
        "drpo.train.sft.data:at_step",
        lambda right: lambda groups, batch, step, seed: right(groups, batch, step, seed + step),
        (ORDER,),
    ),
    Replacement(
        "a resumed run of supervised fine-tuning begins with a new optimiser",
        "drpo.train.checkpoint:restore",
        lambda right: lambda last, trainable, optimizer, *rest: right(last, trainable, None, *rest),
        (RESUMED,),
    ),
)
