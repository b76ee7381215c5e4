"""The tokens between two turns: what a chat template puts after a sampled turn and before the next.

What the model sampled is never decoded and encoded again. The next turn's prompt is

    prompt ids + sampled ids + glue ids

where the glue is found by a sentinel: the template renders [user, assistant SENTINEL, *replies] with a generation
prompt, and the text after SENTINEL is encoded alone. No prefix of another rendering is cut off: many templates render
an earlier assistant's turn otherwise than the last one's.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drpo.rollout.chat_template import encode, hide_forgeries, render, special_tokens, unused_words
from drpo.rollout.turn_ends import turn_end
from drpo.types import Message
from drpo.types.environment import ToolSchema

_OPENING: Message = {"role": "user", "content": "u"}


def glue(
    tokenizer: PreTrainedTokenizerBase,
    replies: Sequence[Message],
    *,
    last: int,
    stop: frozenset[int],
    tools: Sequence[ToolSchema] = (),
    calls: Sequence[Mapping[str, Any]] = (),
) -> Tensor | None:
    """Return the ids that follow a sampled turn, up to where the model speaks again; None where none can be told.

    Args:
        tokenizer: the model's, with its chat template where it has one.
        replies: of the environment, at least one: user and tool messages.
        last: the last id that was sampled. Where it is a special stop token, the stop token that the template puts at
            the end of a turn is left out, with the white space before it; a stop token of text ends no turn of the
            template, which adds its own.
        stop: ids of the tokens that end a turn.
        tools: schemas of the episode's tools, as the first prompt had them.
        calls: `tool_calls` of the sampled turn, for templates that take a tool's reply after a call alone.

    Returns:
        [K] int64, or None: the template refuses the replies, leaves out what they say, or renders the sentinel not
        once. The conversation then has to be rendered anew, as a further sequence.

    Example:
        >>> from drpo.model.loading import tiny
        >>> _, tokenizer = tiny()
        >>> tokenizer.chat_template = (
        ...     "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
        ...     "{% if add_generation_prompt %}<assistant>{% endif %}"
        ... )
        >>> ids = glue(tokenizer, [{"role": "user", "content": "higher"}], last=0, stop=frozenset({0}))
        >>> tokenizer.decode(ids)
        '<user>higher<eos><assistant>'
    """
    (*hidden, turn), texts = hide_forgeries(tokenizer, [*replies, {"calls": calls}])
    sentinel = next(unused_words(hidden))
    text = _after_sentinel(tokenizer, sentinel, hidden, tools)
    if text is None and calls:
        text = _after_calls(tokenizer, sentinel, hidden, tools, turn["calls"], stop)
    if text is None or not all(_says(text, reply) for reply in hidden):
        return None
    ids = encode(tokenizer, text, texts)
    if last in stop:
        ids = ids[_end_of_turn(tokenizer, ids, last, stop) :]
    return torch.tensor(ids, dtype=torch.int64) if ids else None


def _after_sentinel(
    tokenizer: PreTrainedTokenizerBase, sentinel: str, replies: Sequence[Message], tools: Sequence[ToolSchema]
) -> str | None:
    """What a template puts after the assistant's words; None where it refuses, or does not say them once."""
    try:
        text = render(tokenizer, [_OPENING, {"role": "assistant", "content": sentinel}, *replies], tools)
    except Exception:  # a template is a program, which may raise anything
        return None
    return text.partition(sentinel)[2] if text.count(sentinel) == 1 else None


def _after_calls(
    tokenizer: PreTrainedTokenizerBase,
    sentinel: str,
    replies: Sequence[Message],
    tools: Sequence[ToolSchema],
    calls: Sequence[Mapping[str, Any]],
    stop: frozenset[int],
) -> str | None:
    """The same after a turn that calls tools: from the token that ends the turn."""
    turn = [_OPENING, {"role": "assistant", "content": sentinel, "tool_calls": list(calls)}]
    try:
        so_far, whole = render(tokenizer, turn, tools, goes_on=False), render(tokenizer, [*turn, *replies], tools)
    except Exception:
        return None
    tokens = {*stop, turn_end(tokenizer)} - {None}
    ends = [so_far.rfind(word) for i in tokens if (word := str(tokenizer.convert_ids_to_tokens(i)))]
    end = max(ends, default=-1)
    if not whole.startswith(so_far) or end < so_far.find(sentinel):
        return None
    return whole[end:]


def _says(text: str, reply: Message) -> bool:
    """Whether a template's text has a reply's content, as it is or as JSON; some leave out roles they do not know."""
    content = str(reply.get("content", "")).strip()
    return content in text or json.dumps(content)[1:-1] in text


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], last: int, stop: frozenset[int]) -> int:
    """How many of the glue's ids end the turn before: white space or special tokens, and a stop token; or none.

    None too where `last` is another stop token than the template's and no special one, such as a word.
    """
    for n, token in enumerate(ids):
        if str(tokenizer.decode([token], skip_special_tokens=True)).strip():
            return 0
        if token in stop:
            ends = token == last or last in special_tokens(tokenizer).values()
            return n + 1 if ends else 0
    return 0
