"""Where a turn of the model ends: the model's EOS ids, and the token with which its chat template ends a turn."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.rollout.chat_template import encode, render, special_tokens, unused_words
from drpo.types import Message

_OPENING: Message = {"role": "user", "content": "u"}


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> frozenset[int]:
    """Return the ids of the tokens that end a turn.

    Args:
        model: with its generation defaults.
        tokenizer: with the chat template.
        stop: of `--stop`: a token's text, or its id in digits. Where none is named, these are the EOS ids of the
            generation defaults, the tokenizer's EOS, and the token with which the chat template ends a turn.

    Raises:
        InputError: a text that is not one token, or an id without an embedding.

    Example:
        >>> from drpo.model.loading import tiny
        >>> sorted(stop_ids(*tiny())), sorted(stop_ids(*tiny(), stop=["<eos>", "256"]))
        ([0], [0, 256])
    """
    if stop:
        size = len(model.get_input_embeddings().weight)
        return frozenset(_token_id(tokenizer, text, size) for text in stop)
    return eos_ids(model, tokenizer) | {end for end in [turn_end(tokenizer)] if end is not None}


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end a text: those of the model's generation defaults, and the tokenizer's EOS."""
    generation: Any = model.generation_config
    configured = generation.eos_token_id if generation is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None)


def _token_id(tokenizer: PreTrainedTokenizerBase, text: str, size: int) -> int:
    if text.isascii() and text.isdecimal():
        if int(text) >= size:
            raise InputError(f"stop={text}: the model has token ids below {size}")
        return int(text)
    ids = encode(tokenizer, text, {})
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = " ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
        read = f"it reads {pieces}" if pieces else "it reads nothing"
        raise InputError(f"stop={text!r}: the tokenizer has no such token ({read}); name one token, or its id")
    return ids[0]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the special token with which the chat template ends an assistant's turn; None without one.

    The template renders a conversation that ends with the assistant's turn, and one that goes on behind it. Of the
    special tokens that follow the turn in both, it is the last; where they share none (a template that ends the last
    turn in a way of its own), the last of those that follow at the end.

    Args:
        tokenizer: with the model's chat template, or without one.

    Example:
        >>> from drpo.model.loading import tiny
        >>> _, tokenizer = tiny()
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
        >>> turn_end(tokenizer)
        0
    """
    if not tokenizer.chat_template:
        return None
    word = next(unused_words([_OPENING]))
    turn = [_OPENING, {"role": "assistant", "content": word}]
    at_end = _special_behind(tokenizer, word, turn)
    further = _special_behind(tokenizer, word, [*turn, _OPENING])
    shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(at_end, further, strict=False))]
    return next(reversed(shared or at_end), None)


def _special_behind(tokenizer: PreTrainedTokenizerBase, word: str, messages: Sequence[Message]) -> list[int]:
    """The special tokens right behind a word of a conversation; none where the template does not say it once."""
    try:
        text = render(tokenizer, messages, goes_on=False)
    except Exception:  # a template is a program, which may raise anything
        return []
    if text.count(word) != 1:
        return []
    special = frozenset(special_tokens(tokenizer).values())
    ids = encode(tokenizer, text.partition(word)[2].lstrip(), {})
    return list(takewhile(special.__contains__, ids))
