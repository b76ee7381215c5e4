"""Conversations as they are trained on: the ids that the chat template makes of them, and which the model has to say.

A conversation is read as an episode of a rollout is: before each turn of the assistant stand the ids that the model
would be prompted with, and its turn ends with the token at which sampling would stop.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.rollout.chat_template import encode, hide_forgeries, render
from drpo.rollout.glue import glue
from drpo.rollout.prompts import encode_prompt
from drpo.rollout.turn_ends import turn_end
from drpo.types import Message, Problem, TokenSequence
from drpo.types.environment import ToolSchema

Piece = tuple[Sequence[int], bool]
"""Ids in a row, and whether they are trained."""


def trained_sequences(
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    messages: Sequence[Message],
    tools: Sequence[ToolSchema] = (),
    *,
    end: int | None = None,
    every_token: bool = False,
) -> tuple[TokenSequence, ...]:
    """Return a conversation's ids, in which the turns of the assistant are the trained ones.

    There is one sequence, unless the template writes an earlier turn otherwise once the conversation goes on (without
    its thinking, say): the turns after that are a further sequence, as in a rollout.

    Args:
        tokenizer: the model's, with its chat template where it has one.
        where: the conversation's place in the data, for messages.
        messages: of it; what follows the assistant's last turn is left out.
        tools: schemas of the tools that the first prompt shows.
        end: id of the token that ends a turn, see `turn_end`; None to find it.
        every_token: train on all tokens but the first, not on the assistant's turns alone.

    Raises:
        InputError: the template refuses the conversation, or begins a turn otherwise than its own prompt for it.

    Example:
        >>> from drpo.model.loading import tiny
        >>> said = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
        >>> (sequence,) = trained_sequences(tiny()[1], "line 1", said)
        >>> tiny()[1].decode(sequence.prompt_ids), tiny()[1].decode(sequence.token_ids)
        ('1 + 1?', '2<eos>')
    """
    end = turn_end(tokenizer) if end is None else end
    begun: list[list[Piece]] = []
    turns = [i for i, said in enumerate(messages) if said["role"] == "assistant"]
    for i, last in zip(turns, [-1, *turns], strict=False):
        context = encode_prompt(tokenizer, Problem(where, tuple(messages[:i]), ""), tools).tolist()
        between = _between(tokenizer, begun[-1], context, messages[last + 1 : i]) if begun else None
        if between is None:
            begun.append([(context, False)])
        else:
            begun[-1].append((between, False))
        begun[-1].append((_turn(tokenizer, where, messages[: i + 1], tools, end), True))
    if every_token:
        whole = [token for ids, _ in begun[-1] for token in ids]
        begun = [[(whole[:1], False), (whole[1:], True)]]
    return tuple(map(_sequence, begun))


def _between(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece], context: Sequence[int], replies: Sequence[Message]
) -> list[int] | None:
    """The ids between a sequence and the assistant's next turn; None where the template writes it anew.

    Args:
        tokenizer: the model's.
        pieces: of the sequence so far.
        context: what the template makes of all that comes before the next turn.
        replies: the messages between the turns.
    """
    so_far = [token for ids, _ in pieces for token in ids]
    if tokenizer.chat_template:
        return list(context[len(so_far) :]) if list(context[: len(so_far)]) == so_far else None
    following = glue(tokenizer, replies, last=so_far[-1], stop=frozenset(so_far[-1:]))
    return None if following is None else following.tolist()


def _turn(
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    messages: Sequence[Message],
    tools: Sequence[ToolSchema],
    end: int | None,
) -> list[int]:
    """The ids of a conversation's last message, from where the model begins to speak to the token that ends its turn.

    A template without such a token leaves the end to the tokenizer's EOS.
    """
    hidden, texts = hide_forgeries(tokenizer, [*messages, *tools])
    told, shown = hidden[: len(messages)], hidden[len(messages) :]
    text = str(told[-1].get("content") or "")
    if tokenizer.chat_template:
        before = _rendered(tokenizer, where, told[:-1], shown, goes_on=True)
        after = _rendered(tokenizer, where, told, shown, goes_on=False)
        if not after.startswith(before):
            raise InputError(
                f"{where}: the chat template writes the assistant's turn otherwise than its own prompt begins it "
                f"(...{before[-24:]!r}), so no prompt of the model leads to this turn; give a template with "
                "--chat-template FILE"
            )
        text = after[len(before) :]
    return _ended(tokenizer, encode(tokenizer, text, texts), encode(tokenizer, text.rstrip(), texts), end, where)


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    messages: Sequence[Message],
    tools: Sequence[ToolSchema],
    goes_on: bool,
) -> str:
    try:
        return render(tokenizer, messages, tools, goes_on=goes_on)
    except Exception as error:  # a template is a program, which may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: the model's chat template refuses it: {reason}") from None


def _ended(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], trimmed: list[int], end: int | None, where: str
) -> list[int]:
    """A turn's ids up to the token that ends it, which the template has put there, or else the tokenizer's EOS."""
    if end in ids:
        return ids[: len(ids) - ids[::-1].index(end)]
    eos: Any = tokenizer.eos_token_id
    if eos is None:
        raise InputError(f"{where}: nothing ends the assistant's turn; give the tokenizer an EOS or a chat template")
    return [*(ids if not tokenizer.chat_template else trimmed), eos]


def _sequence(pieces: Sequence[Piece]) -> TokenSequence:
    """The record of a prompt and what follows it, of which some is trained."""
    (prompt, _), *behind = pieces
    sampled = torch.cat([torch.full((len(ids),), trained) for ids, trained in behind])
    n = int(sampled.sum())
    return TokenSequence(
        prompt_ids=torch.tensor(prompt, dtype=torch.int64),
        token_ids=torch.tensor([token for ids, _ in behind for token in ids], dtype=torch.int64),
        sampled=sampled,
        behavior_logp=torch.zeros(n),
        version=torch.zeros(n, dtype=torch.int64),
    )
