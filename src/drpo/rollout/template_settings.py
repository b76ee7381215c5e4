"""A chat template in place of the tokenizer's, and values for a template's arguments; both stay with the tokenizer."""

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from drpo.errors import InputError, nearest

_OF_DRPO = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Arguments of every template that drpo sets itself."""


class _Generation(Extension):
    """The tag `generation`, with which templates of transformers mark what the model says."""

    tags = {"generation"}  # noqa: RUF012 (as its base class has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_JINJA = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
_FUNCTIONS = frozenset({*_JINJA.globals, "raise_exception", "strftime_now"})
"""Names that every template may read without an argument of the name: Jinja's own, and those of transformers."""


def set_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None, arguments: Mapping[str, Any] | None = None
) -> None:
    """Give a tokenizer a chat template, and the template default values of its arguments.

    The values are written into the template's text, as what a name means where the caller does not say. So prompts, the
    glue between turns and the saved tokenizer have them alike, and whoever uses the saved model may choose others.

    Args:
        tokenizer: changed in place.
        template: Jinja text; None keeps the tokenizer's own.
        arguments: values of JSON's types, by name.

    Raises:
        InputError: the template is no Jinja, there is none, or it does not read an argument of that name.

    Example:
        >>> from drpo.model.loading import tiny
        >>> _, tokenizer = tiny()
        >>> set_template(tokenizer, "{{ messages[0].content }}{% if thinking %} Think.{% endif %}", {"thinking": True})
        >>> message = [{"role": "user", "content": "Hello."}]
        >>> tokenizer.apply_chat_template(message, tokenize=False)
        'Hello. Think.'
        >>> tokenizer.apply_chat_template(message, tokenize=False, thinking=False)
        'Hello.'
    """
    if template is not None:
        _variables(template)  # raises for text that is no template
        tokenizer.chat_template = template
    if not arguments:
        return
    if not tokenizer.chat_template:
        raise InputError(
            f"template.{next(iter(arguments))}: the model has no chat template; --chat-template FILE gives it one"
        )
    given = {*_OF_DRPO, *_FUNCTIONS, *tokenizer.special_tokens_map}
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {"": tokenizer.chat_template}
    known = sorted({name for text in named.values() for name in _variables(text)} - given)
    for name in arguments:
        if name in given:
            raise InputError(f"template.{name}: drpo or the tokenizer sets it; leave it out")
        if name not in known:
            suggestion = nearest(name, known) if known else "; it reads none"
            raise InputError(f"template.{name}: the model's chat template has no argument of this name{suggestion}")
    defaults = "".join(_default(name, value) for name, value in arguments.items())
    # Jinja drops the line's end behind a block, and nothing more.
    settled = {name: f"{defaults}\n{text}" for name, text in named.items()}
    tokenizer.chat_template = settled if isinstance(tokenizer.chat_template, dict) else settled[""]


def _variables(template: str) -> frozenset[str]:
    """The names that a template reads and does not set."""
    try:
        return frozenset(find_undeclared_variables(_JINJA.parse(template)))
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise InputError(
            f"chat_template: it is no Jinja template ({error}{'' if line is None else f', line {line}'})"
        ) from None


def _default(name: str, value: Any) -> str:
    return f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"


def _literal(value: Any) -> str:
    """A value of JSON's types as Jinja writes it."""
    match value:
        case None:
            return "none"
        case Mapping():
            return f"{{{', '.join(f'{_literal(key)}: {_literal(inner)}' for key, inner in value.items())}}}"
        case list() | tuple():
            return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False)
