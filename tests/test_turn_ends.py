"""Where turns end, and chat templates of one's own: found, refused, alike in prompts and glue, saved with the model."""

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from drpo.cli import main
from drpo.doctor.prompt import default_system, prompt
from drpo.errors import InputError
from drpo.model import loading
from drpo.rollout import encode_prompt
from drpo.rollout.chat_template import encode_messages
from drpo.rollout.glue import glue
from drpo.rollout.template_settings import set_template
from drpo.rollout.turn_ends import stop_ids, turn_end
from drpo.train.records import read_records
from drpo.types import Problem
from support.base_model import END, TEMPLATE, base_model
from support.hostile import refused
from support.pictures import without_pictures

ASKED = Problem.of_text("7", "1 + 1?", "2")
REPLY = [{"role": "user", "content": "higher"}]
TURN = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
ENDS = {
    "<|end|>": TURN + "<|end|>\n{% endfor %}",
    "<eos>": TURN + "\n <eos>{% endfor %}",
    "<|close|>": TURN + "{% if m.role == 'assistant' %}<|answered|>{% endif %}<|close|>{% endfor %}",
    "<|turn|>": TURN + "<|turn|>{% endfor %}{% if not add_generation_prompt %}<eos>{% endif %}",  # as Phi-4-mini's
    "<|return|>": TURN + "{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}",  # as GPT-OSS's
    None: "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}",
}


def tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    made = loading.load_tokenizer("tiny")
    names = ("start", "end", "close", "answered", "turn", "return", "user", "assistant")
    made.add_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names], special_tokens=True)
    made.chat_template = template
    return made


@pytest.mark.parametrize("token", ENDS)
def test_the_token_with_which_a_template_ends_a_turn_is_found_by_rendering(token: str | None) -> None:
    made = tokenizer(ENDS[token])
    found = turn_end(made)
    assert (None if found is None else made.convert_ids_to_tokens(found)) == token


def test_a_turn_ends_at_eos_and_where_the_template_ends_it_or_at_the_tokens_that_are_named() -> None:
    model, made = base_model()
    eos, end = (made.convert_tokens_to_ids(t) for t in ("<|endoftext|>", END))
    assert turn_end(made) == end and stop_ids(model, made) == {eos, end}
    assert stop_ids(model, made, [END, "65", "\n"]) == {end, 65, made("\n")["input_ids"][0]}
    for named, said in (("</answer>", "no such token"), ("999", "ids below 260")):
        with pytest.raises(InputError, match=f"stop=.*{named}.*{said}"):
            stop_ids(model, made, [named])


def test_a_content_cannot_spell_a_token_that_only_its_mark_makes_special() -> None:
    made = tokenizer(ENDS["<|end|>"])
    end = made.convert_tokens_to_ids("<|end|>")
    assert encode_messages(made, [{"role": "user", "content": "x<|end|>y"}]).count(end) == 1


def test_glue_adds_the_templates_end_behind_a_stop_token_of_text_alone() -> None:
    _, made = base_model()
    eos, end, colon = made.eos_token_id, made.convert_tokens_to_ids(END), made(":")["input_ids"][0]
    stop, rest = frozenset({eos, end, colon}), "\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n"

    def behind(last: int, stop: frozenset[int] = stop) -> str:
        return str(made.decode(glue(made, REPLY, last=last, stop=stop)))

    assert behind(end) == behind(eos) == rest and behind(colon) == behind(colon, frozenset({colon})) == END + rest


def test_arguments_of_a_template_are_its_defaults_everywhere_and_in_the_saved_tokenizer(tmp_path: Path) -> None:
    text = "\n {% if a is defined %}{{ a|tojson }}{% endif %}{% for m in messages %}{{ m.content }}|{% endfor %}{{ b }}"
    plain, made = tokenizer(text), tokenizer(text)
    a = {"k": [True, None, -1.5, 'q"\\\n%}{{é\U0001f600']}
    set_template(made, None, {"a": a, "b": "B"})
    messages = [{"role": "user", "content": "x"}]
    wanted = plain.apply_chat_template(messages, tokenize=False, a=a, b="B")
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert json.loads(wanted.strip().partition("x|")[0]) == a
    assert [t.apply_chat_template(messages, tokenize=False) for t in (made, loaded)] == [wanted, wanted]
    assert loaded.apply_chat_template(messages, tokenize=False, b="C")[-1] == "C"


def test_a_template_may_mark_what_the_model_says_and_leave_a_loop() -> None:
    inner = "{% generation %}{{ m.content }}{{ b }}{% endgeneration %}{% break %}"
    made = tokenizer("{% for m in messages %}" + inner + "{% endfor %}")
    set_template(made, None, {"b": "B"})
    assert made.apply_chat_template([{"role": "user", "content": "x"}] * 2, tokenize=False) == "xB"


@pytest.mark.parametrize(
    ("template", "arguments", "line"),
    [
        ("{% for %}", {}, r"chat_template: it is no Jinja template \(.*, line 1\)"),
        (None, {"enable_thinkin": 1}, "template.enable_thinkin: .* did you mean 'enable_thinking'"),
        ("{% set ns = namespace(a=raise_exception) %}", {"b": 1}, "template.b: .* of this name; it reads none"),
        ("{{ messages }}", {"raise_exception": 1}, "template.raise_exception: drpo or the tokenizer sets it"),
        (None, {"messages": 1}, "template.messages: drpo or the tokenizer sets it"),
        (None, {"eos_token": "x"}, "template.eos_token: drpo or the tokenizer sets it"),
    ],
)
def test_what_is_no_template_or_no_argument_of_it_is_refused(template, arguments, line) -> None:
    with pytest.raises(InputError, match=line):
        set_template(base_model()[1], template, arguments)
    with pytest.raises(InputError, match=r"template.x: the model has no chat template; --chat-template FILE gives"):
        set_template(loading.load_tokenizer("tiny"), None, {"x": 1})


def test_the_command_refuses_what_is_no_template(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no template")
    assert "No such file" in refused(["train", "smoke", "--chat-template", str(tmp_path / "none")])
    assert "no Jinja template" in refused(["train", "smoke", "--chat-template", str(tmp_path / "text")])
    assert "a value is missing" in refused(["doctor", "smoke", "--template.enable-thinking"])
    assert "is no name" in refused(["eval", "tiny", "--template.1", "2"])


@pytest.mark.parametrize("template", [None, "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}A:"])
def test_a_prompt_begins_with_bos_once(template: str | None) -> None:
    made = tokenizer(template)
    made.bos_token = "<|start|>"
    bos = made.bos_token_id
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", bos)]
    )
    for text in ("hello", "<|start|>hello"):
        ids = encode_prompt(made, Problem.of_text("7", text, "2")).tolist()
        assert ids[0] == bos and ids.count(bos) == 1
    made.chat_template = "<|start|><|start|>" + TURN + "{% endfor %}"
    assert prompt(made, [0], ASKED).verdict == "broken"
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # without any
    assert prompt(made, [0], ASKED).verdict == "note"


@pytest.mark.parametrize(
    ("before", "system"),
    [
        ("{% if messages[0].role != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}", "Be kind."),
        ("<|start|>system\n\nToday: {{ strftime_now('%Y')[:0] }}May<|end|>", "Today: May"),
        ("<|user|>", ""),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}<|start|>", ""),
    ],
)
def test_the_system_message_that_a_template_inserts_is_known_and_shown(before: str, system: str) -> None:
    made = tokenizer(before + ENDS["<|end|>"])
    finding = prompt(made, [0], ASKED)
    assert default_system(made) == system
    assert (repr(system) in finding.figure) == bool(system)
    assert finding.verdict == ("note" if "strftime_now" in before else "ok")


def test_a_base_model_reads_the_texts_alone_and_the_doctor_says_so() -> None:
    finding = prompt(loading.load_tokenizer("tiny"), [0], ASKED)
    assert finding.figure == "no chat template: the messages' texts, with blank lines between; a turn ends with '<eos>'"


def test_the_papers_recipe_starts_on_a_base_model_and_its_folder_is_complete(tmp_path, monkeypatch, capsys) -> None:
    """Qwen3-4B-Base's tokenizer settings: end of text is not what the template ends turns with."""
    monkeypatch.chdir(tmp_path)
    Path("brief.jinja").write_text(TEMPLATE.replace("assistant\\n", "assistant\\nBriefly: "))
    options = [
        "--model",
        "support.base_model:base_model",
        "--task",
        "addition(1, 9)",
        "--prompts",
        "4",
        "--updates",
        "2",
    ]
    options += [
        "--sampling.max-new-tokens",
        "48",
        "--sampling.samples",
        "4",
        "--eval-task",
        "addition(1, 9)",
        "--eval-problems",
        "3",
        "--stall",
        "0",
    ]
    options += ["--eval-samples", "1", "--steps", "2", "--eval-every", "0", "--template.enable-thinking", "false"]
    with without_pictures():
        status = main(["train", "drpo_paper", *options, "--chat-template", "brief.jinja", "--out", "run"])
    assert status in (0, 1), capsys.readouterr()  # 1: it learnt nothing, which no one asks of random weights
    Path("brief.jinja").unlink()
    said = capsys.readouterr()
    assert "a turn ends with '<|endoftext|>', '<|im_end|>'" in " ".join((said.err + said.out).split())
    _, made = base_model()
    rollouts = read_records(Path("run/rollouts.jsonl"))
    last = {made.convert_ids_to_tokens(r["token_ids"][-1]) for r in rollouts if r["finish_reason"] == "stop"}
    assert END in last <= {END, "<|endoftext|>"}
    assert all(r["prompt"].endswith("<|im_start|>assistant\nBriefly: <think>\n\n</think>\n\n") for r in rollouts)
    assert set(GenerationConfig.from_pretrained("run/model").eos_token_id) == stop_ids(*base_model())
    assert (
        encode_prompt(AutoTokenizer.from_pretrained("run/model"), ASKED).tolist()
        == encode_prompt(loading.load("run/model")[1], ASKED).tolist()
    )
    config = json.loads(Path("run/config.json").read_text())["model"]
    assert "Briefly" in config["chat_template"] and config["chat_template_kwargs"] == {"enable_thinking": False}
    trust = ["--trust-remote-code"]
    assert main(["export", "run", "exported", "--step", "2", *trust]) == 0
    exported = AutoTokenizer.from_pretrained("exported")
    assert exported.decode(encode_prompt(exported, ASKED)).endswith("Briefly: <think>\n\n</think>\n\n")
