"""Calls of tools as chat templates write them: hand-made templates, each with the form of calls of a family of models.

Not covered: the chat templates of these models themselves, which do not ship with transformers.
"""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from drpo.environments.local import LocalEnvironments
from drpo.environments.tools import Tools
from drpo.model import loading
from drpo.rollout import EpisodeDriver, ScriptedEngine
from drpo.rollout.native_calls import FORMS, native_calls, read_native, reads_its_calls
from drpo.rollout.prompts import PromptLimits
from drpo.types import Problem, Request, Sampling
from drpo.types.calls import Call, MalformedCall

ARGUMENTS = "{% for k, v in f.arguments.items() %}"
CALLS = {
    "Qwen3-Coder, Qwen3.5, Nemotron 3": "<tool_call>\n<function={{ f.name }}>\n"
    + ARGUMENTS
    + "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
    "GLM-4.5": "<tool_call>{{ f.name }}\n"
    + ARGUMENTS
    + "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n{% endfor %}</tool_call>",
    "Llama 3": '{{ "\\n\\n" }}{"name": "{{ f.name }}", "parameters": {{ f.arguments|tojson }}}<|eot_id|>',
    "gpt-oss": " to=functions.{{ f.name }}<|channel|>commentary json<|message|>{{ f.arguments|tojson }}<|call|>",
    "Gemma 4": "<|tool_call>call:{{ f.name }}{{ '{' }}"
    + ARGUMENTS
    + '{{ k }}:{% if v is string %}<|"|>{{ v }}<|"|>{% else %}{{ v }}{% endif %}'
    + "{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}<tool_call|>",
}
TAGS = '<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments|tojson }}}</tool_call>'
PYTHON = "<|calls|>[{{ f.name }}(" + ARGUMENTS + "{{ k }}='{{ v }}'{% endfor %})]"
SCHEMA = {
    "type": "function",
    "function": {"name": "double", "parameters": {"properties": {"x": {"type": "integer"}, "of": {"type": "string"}}}},
}
ASKED = Call("double", {"x": 21, "of": "a, b"})


def tokenizer(calls: str) -> PreTrainedTokenizerBase:
    """Of a model whose chat template writes calls so."""
    _, made = loading.tiny()
    made.chat_template = (
        "{{ tools|tojson if tools }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + calls + "{% endfor %}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return made


def written(made: PreTrainedTokenizerBase, call: Call) -> str:
    """What the model has to say for a call."""
    turn: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call.as_message]}
    text = str(made.apply_chat_template([turn], tokenize=False))
    return text.removeprefix("<assistant>").removesuffix("<eos>")


@pytest.mark.parametrize("name", FORMS)
def test_a_call_is_read_as_the_template_writes_it(name: str) -> None:
    made = tokenizer(CALLS[name])
    said = made(written(made, ASKED))["input_ids"]
    assert native_calls(made, said, [SCHEMA]) == (ASKED,) and reads_its_calls(made)
    assert native_calls(made, made("The answer is {42}.")["input_ids"], [SCHEMA]) == ()
    assert [read_native(form, written(made, ASKED), [SCHEMA]) == (ASKED,) for form in FORMS.values()].count(True) == 1


def test_two_calls_and_one_that_was_only_thought_of() -> None:
    made = tokenizer(CALLS["Qwen3-Coder, Qwen3.5, Nemotron 3"])
    call = written(made, ASKED)
    assert native_calls(made, made(f"{call}</think>{call}\n{call}")["input_ids"], [SCHEMA]) == (ASKED, ASKED)


def test_a_call_that_cannot_be_read_says_why() -> None:
    (call,) = read_native(FORMS["gpt-oss"], " to=functions.double<|message|>{x: 1<|call|>", [SCHEMA])
    assert isinstance(call, MalformedCall) and call.reason.startswith("the call cannot be read: json parser")
    (call,) = read_native(FORMS["Llama 3"], '{"name": 3, "parameters": {}}', [SCHEMA])
    assert isinstance(call, MalformedCall)


def played(made: PreTrainedTokenizerBase, first: str) -> tuple[str, int, int]:
    """An episode in which the model says something, then "42": what it read; calls and failed ones of the first."""

    def script(request: Request) -> str:
        return first if request.key[-1] == 0 else "42"

    driver = EpisodeDriver(
        ScriptedEngine(made, script),
        made,
        frozenset({int(made.eos_token_id)}),
        PromptLimits.of(loading.tiny()[0]),
        environments=LocalEnvironments(Tools("support.environments:double"), seed=0),
    )
    ((episode,),) = driver.run([Problem.of_text("0", "?", "42")], Sampling(samples=1, max_new_tokens=200), (0,))
    assert episode.played is not None and episode.played.failure is None
    assert len(episode.played.calls) == len(episode.played.failed_calls) == len(episode.turns)
    assert not any(episode.played.calls[1:]) and not any(episode.played.failed_calls[1:])
    return episode.prompt, episode.played.calls[0], episode.played.failed_calls[0]


@pytest.mark.parametrize("name", FORMS)
def test_a_tool_is_called_in_it(name: str) -> None:
    made = tokenizer(CALLS[name])
    prompt, calls, failed = played(made, written(made, Call("double", {"x": 21})))
    assert (calls, failed) == (1, 0) and prompt.startswith('[{"type": "function"')


def test_a_form_that_nobody_reads_is_not_asked_for() -> None:
    """The tools are then described in words, with calls in tags; a template that writes these is believed."""
    said = '<tool_call>{"name": "double", "arguments": {"x": 21}}</tool_call>'
    for calls, begins in ((PYTHON, "<system>You can call these tools"), (TAGS, '[{"type": "function"')):
        assert reads_its_calls(tokenizer(calls)) == (calls == TAGS)
        prompt, *counts = played(tokenizer(calls), said)
        assert prompt.startswith(begins) and counts == [1, 0]


def test_a_tokenizer_that_says_how_it_is_read_is_believed() -> None:
    made = tokenizer(PYTHON)
    made.response_template = {**FORMS["GLM-4.5"], "start_anchor": "<assistant>"}
    assert played(made, written(tokenizer(CALLS["GLM-4.5"]), Call("double", {"x": 21})))[1:] == (1, 0)
