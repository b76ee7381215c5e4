"""Conversations through a model's chat template, as text and as token ids; no content speaks as another role.

A text of a message that spells a special token is encoded letter by letter. One that spells none is encoded with the
template's text around it, as always.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from drpo.types import Message
from drpo.types.environment import ToolSchema

BLANK_LINE = "\n\n"
"""Between the messages of a model without a chat template."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[ToolSchema] = (),
    *,
    goes_on: bool = True,
) -> str:
    """Return what a chat template makes of a conversation; without one, the messages' texts joined by blank lines.

    Args:
        tokenizer: the model's.
        messages: of the conversation.
        tools: schemas of the tools that the model may call.
        goes_on: end where the model speaks next.

    Raises:
        Whatever the template raises; a template is a program.
    """
    if not tokenizer.chat_template:
        return BLANK_LINE.join(str(m["content"]) for m in messages)
    return str(
        tokenizer.apply_chat_template(
            [dict(m) for m in messages], tools=list(tools) or None, tokenize=False, add_generation_prompt=goes_on
        )
    )


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()
) -> list[int]:
    """Return the ids of a conversation up to where the model speaks next.

    Raises:
        Whatever the template raises.
    """
    hidden, texts = hide_forgeries(tokenizer, [*messages, *tools])
    return encode(tokenizer, render(tokenizer, hidden[: len(messages)], hidden[len(messages) :]), texts, begins=True)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of a tokenizer's special tokens, by text: those with a name, and all that it marks as special.

    Example:
        >>> from drpo.model.loading import tiny
        >>> special_tokens(tiny()[1])
        {'<eos>': 0}
    """
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    marked = ((str(token), i) for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {text: i for text, i in (*named, *marked) if text}


def unused_words(messages: Sequence[Message]) -> Iterator[str]:
    """Yield words that no text of messages has, and that templates neither trim nor rewrite."""
    everything = "".join(map(str, messages))
    return (word for i in count() if (word := f"Sentinel{i}Q4ZW") not in everything)


def hide_forgeries(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[Message], dict[str, str]]:
    """Return messages with a placeholder for each text that spells a special token, and what each stands for.

    Contents, names, arguments of calls: whatever a template may render. Tools are hidden in the same way.
    """
    special = special_tokens(tokenizer)
    words = unused_words(messages)
    texts: dict[str, str] = {}

    def hide(value: Any) -> Any:
        match value:
            case str() if any(token in value for token in special):
                placeholder = next(words)
                texts[placeholder] = value
                return placeholder
            case Mapping():
                return {hide(key): hide(inner) for key, inner in value.items()}
            case list() | tuple():
                return [hide(inner) for inner in value]
        return value

    return [hide(message) for message in messages], texts


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, texts: Mapping[str, str], *, begins: bool = False
) -> list[int]:
    """Return the ids of a template's text, with what its placeholders stand for encoded letter by letter.

    Args:
        tokenizer: it.
        text: of `render`.
        texts: of `hide_forgeries`.
        begins: the text is the first of its sequence; else it goes on from another, and no space is put before it.
    """
    pieces = re.split(f"({'|'.join(texts)})", text) if texts else [text]
    ids: list[int] = []
    for i, piece in enumerate(pieces):  # every second one is a placeholder
        if begins and i == 0:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        else:
            ids += _inside(tokenizer, texts[piece] if i % 2 else piece, split=i % 2 == 1)
    return ids


def _inside(tokenizer: PreTrainedTokenizerBase, text: str, split: bool) -> list[int]:
    """The ids of a text that goes on from another: without the space that SentencePiece puts before a text.

    `split` encodes what looks like a special token letter by letter.
    """
    if not text:
        return []
    anchor = "\n" if _adds_space(tokenizer) else ""
    ids = tokenizer(anchor + text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
    skipped = len(tokenizer(anchor, add_special_tokens=False)["input_ids"]) if anchor else 0
    return list(ids[skipped:])


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    first = tokenizer.convert_ids_to_tokens(tokenizer("x", add_special_tokens=False)["input_ids"])[0]
    return str(first).startswith("\u2581")
