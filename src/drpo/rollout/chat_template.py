"""Conversations through a model's chat template, as text and as token ids; no content speaks as another role.

A text of a message that spells a special token, or a token that the template puts between turns, is encoded letter by
letter. One that spells none is encoded with the template's text around it, as always.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from drpo.types import Message
from drpo.types.environment import ToolSchema
from drpo.types.problem import message

BLANK_LINE = "\n\n"
"""Between the messages of a model without a chat template."""
_SAID = "Sentinel0Q4ZW"


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

    Special are those that the tokenizer marks so, with a name (its EOS, say) or without (Llama's ends of a header), and
    those that the chat template puts between turns (what announces DeepSeek's users is not marked).
    Contents, names, arguments of calls: whatever a template may render. Tools are hidden in the same way.
    """
    special = {*special_tokens(tokenizer), *_between_turns(tokenizer, tokenizer.chat_template)}
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


@lru_cache(maxsize=4)
def _between_turns(tokenizer: PreTrainedTokenizerBase, _template: str | None) -> frozenset[str]:
    """Added tokens, not marked special, that a chat template puts around messages; thinking is no role."""
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if not t.special and len(t.content.strip()) > 1]
    if not (added and tokenizer.chat_template):
        return frozenset()
    between = _around(tokenizer, ("system", "user", "assistant", "user"))
    if between is None:  # some templates know no system
        between = (_around(tokenizer, ("user", "assistant", "user")) or "").partition(_SAID)[2]
    return frozenset(token for token in added if token in between and "think" not in token)


def _around(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> str | None:
    """What a chat template makes of a conversation of these roles; None where it refuses."""
    try:
        return render(tokenizer, [message(role, _SAID) for role in roles], goes_on=False)
    except Exception:  # a template is a program, which may raise anything
        return None


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
        elif i % 2:
            ids += _by_letter(tokenizer, texts[piece])
        else:
            ids += _inside(tokenizer, piece, split=False)
    return ids


def _by_letter(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that goes on from another, of which none is a special token.

    Tokenizers split what is marked special; the other tokens are cut behind their first letter.
    """
    tokens = "|".join(map(re.escape, _between_turns(tokenizer, tokenizer.chat_template)))
    cuts = [m.start() + 1 for m in re.finditer(f"(?={tokens})", text)] if tokens else []
    pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    return [i for piece in pieces for i in _inside(tokenizer, piece, split=True)]


def _inside(tokenizer: PreTrainedTokenizerBase, text: str, split: bool) -> list[int]:
    """The ids of a text that goes on from another: without the space that SentencePiece puts before a text.

    `split` encodes what looks like a token that is marked special letter by letter.
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
