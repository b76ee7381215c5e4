"""Conversations through a model's chat template, as text and as token ids; no content speaks as another role.

Content that spells a special token is encoded letter by letter. Content without one is encoded with the template's text
around it, as always.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

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
    hidden, contents = hide_forgeries(tokenizer, messages)
    text = render(tokenizer, hidden, tools)
    if all(text.count(placeholder) == 1 for placeholder in contents):
        return encode(tokenizer, text, contents, begins=True)
    raise ValueError("a message spells a special token, and the template leaves it out or repeats it")


def unused_words(messages: Sequence[Message]) -> Iterator[str]:
    """Yield words that no content has, and that templates neither trim nor rewrite."""
    everything = "".join(str(m.get("content")) for m in messages)
    return (word for i in count() if (word := f"Sentinel{i}Q4ZW") not in everything)


def hide_forgeries(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[Message], dict[str, str]]:
    """Return messages with a placeholder for each content that spells a special token, and what each stands for."""
    special = [token for token in tokenizer.all_special_tokens if token]
    words = unused_words(messages)
    hidden, contents = [], {}
    for message in messages:
        content = message.get("content")
        if isinstance(content, str) and any(token in content for token in special):
            placeholder = next(words)
            contents[placeholder] = content
            message = {**message, "content": placeholder}
        hidden.append(message)
    return hidden, contents


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, contents: Mapping[str, str], *, begins: bool = False
) -> list[int]:
    """Return the ids of a template's text, with what its placeholders stand for encoded letter by letter.

    Args:
        tokenizer: it.
        text: of `render`.
        contents: of `hide_forgeries`; each placeholder occurs once.
        begins: the text is the first of its sequence; else it goes on from another, and no space is put before it.
    """
    order = sorted(contents, key=text.index)
    pieces, rest = [], text
    for placeholder in order:
        before, _, rest = rest.partition(placeholder)
        pieces += [(before, False), (contents[placeholder], True)]
    ids: list[int] = []
    for piece, split in [*pieces, (rest, False)]:
        whole = begins and not ids and not split
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"] if whole else _inside(tokenizer, piece, split)
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
