"""Calls of tools in the form in which a model's chat template writes them.

A tokenizer that says how its answers are read (`response_template`) is believed. Of the others the template is asked:
it renders a call with words that occur nowhere else, and the form that reads this call back is taken.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from drpo.rollout.chat_template import render
from drpo.types.calls import Call, MalformedCall, read_calls
from drpo.types.environment import ToolSchema
from drpo.types.problem import message

try:
    from transformers.utils.chat_parsing import parse_response
except ImportError:  # before transformers 5.13
    parse_response = None

Form = Mapping[str, Any]
"""A `response_template` of transformers."""


def _form(opening: str, closing: str, content: str, name: str, arguments: str, **content_args: Any) -> Form:
    field = {
        "open_pattern": opening,
        "close_pattern": rf"{closing}|\Z",
        "content": content,
        "content_args": content_args,
        "repeats": True,
        "transform": {"function": {"name": name, "arguments": arguments}},
    }
    return {"start_anchor": "\0", "fields": {"tool_calls": field}}


FORMS: Mapping[str, Form] = {
    "Qwen3-Coder, Qwen3.5, Nemotron 3": _form(
        r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        r"</function>\s*</tool_call>",
        "xml-inline",
        "{name}",
        "{content}",
        tag_pattern=r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>",
    ),
    "GLM-4.5": _form(
        r"<tool_call>(?P<name>[^<{\s]+)\s*(?=<)",
        r"</tool_call>",
        "xml-inline",
        "{name}",
        "{content}",
        tag_pattern=r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
    ),
    "Llama 3": _form(
        r'(?:\A|\n\n)\s*(?=\{"name")', r"<\|e(?:ot|om)_id\|>", "json", "{content.name}", "{content.parameters}"
    ),
    "gpt-oss": _form(
        r"to=functions\.(?P<name>[\w.-]+)[^{]*?<\|message\|>", r"<\|call\|>", "json", "{name}", "{content}"
    ),
    "Gemma 4": _form(
        r"<\|tool_call>call:(?P<name>[\w.-]+)",
        r"<tool_call\|>",
        "json",
        "{name}",
        "{content}",
        unquoted_keys=True,
        string_delims=[['<|"|>', '<|"|>']],
    ),
}
"""Models whose chat templates write calls so -> how they are read."""

_QUESTION, _CALL = "Sentinel0Q4ZW", Call("sentinel1q4zw", {"sentinel2q4zw": "Sentinel3Q4ZW"})
_TOOL: ToolSchema = {
    "type": "function",
    "function": {
        "name": _CALL.name,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"sentinel2q4zw": {"type": "string", "description": "An argument."}},
            "required": ["sentinel2q4zw"],
        },
    },
}


def native_calls(
    tokenizer: PreTrainedTokenizerBase, said: Sequence[int], tools: Sequence[ToolSchema], before: Sequence[int] = ()
) -> tuple[Call | MalformedCall, ...]:
    """Return the calls that a turn holds in the form of the model's chat template, in order.

    Args:
        tokenizer: with or without a chat template; one that writes JSON in <tool_call> tags has no form of its own.
        said: ids of the turn.
        tools: schemas of the tools; they say which arguments are numbers where the form writes text alone.
        before: ids that the model read, for forms of a tokenizer's own, which may begin there.
    """
    if (own := _own(tokenizer)) is not None:
        return read_native(own, tokenizer.decode(said), tools, tokenizer.decode(before))
    form = _asked(tokenizer, tokenizer.chat_template)[0]
    return () if form is None else read_native(form, tokenizer.decode(said).rpartition("</think>")[2], tools)


def reads_its_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether calls can be read that are written as the chat template writes them, if it writes any."""
    form, plain = _asked(tokenizer, tokenizer.chat_template)
    return plain or form is not None or _own(tokenizer) is not None


def _own(tokenizer: PreTrainedTokenizerBase) -> Form | None:
    return getattr(tokenizer, "response_template", None) if parse_response else None


@lru_cache(maxsize=4)
def _asked(tokenizer: PreTrainedTokenizerBase, _template: str | None) -> tuple[Form | None, bool]:
    """The form that reads the call which the chat template writes, and whether it writes none or one in tags."""
    turn = {"role": "assistant", "content": "", "tool_calls": [_CALL.as_message]}
    try:
        text = render(tokenizer, [message("user", _QUESTION), turn], [_TOOL], goes_on=False)
    except Exception:  # a template is a program, which may raise anything
        return None, True
    written = text.rpartition(_QUESTION)[2]
    forms = FORMS.values() if parse_response and _CALL.name in written else ()
    form = next((form for form in forms if read_native(form, written, [_TOOL]) == (_CALL,)), None)
    return form, _CALL.name not in written or read_calls(written) == [_CALL]


def read_native(
    form: Form, said: str, tools: Sequence[ToolSchema], before: str = ""
) -> tuple[Call | MalformedCall, ...]:
    """Return the calls that a text holds, in order.

    Args:
        form: of the calls.
        said: the text, special tokens included.
        tools, before: as those of `native_calls`.

    Example:
        >>> said = "<tool_call><function=add><parameter=a>1</parameter></function></tool_call>"
        >>> read_native(FORMS["Qwen3-Coder, Qwen3.5, Nemotron 3"], said, [])
        (Call(name='add', arguments={'a': '1'}),)
    """
    try:
        answer = parse_response(said, form, prefix=before, tools=list(tools))
    except Exception as error:  # of the parser, for the model to learn from
        return (MalformedCall(f"the call cannot be read: {' '.join(str(error).split())[:200]}"),)
    return tuple(_call(one) for one in answer.get("tool_calls") or ())


def _call(one: Any) -> Call | MalformedCall:
    function = one.get("function", one) if isinstance(one, dict) else None
    match function:
        case {"name": str(name), "arguments": dict(arguments)}:
            return Call(name, arguments)
    return MalformedCall("a call has a name, and arguments by name")
