"""Prompts that must not be trained on as they are: ended before the answer, refused, too long, no text."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drpo.errors import InputError
from drpo.model import loading
from drpo.recipes.addition import smoke
from drpo.rollout import PromptLimits, encode_prompt, encode_prompts, fitting
from drpo.rollout.least_tokens import least_tokens
from drpo.tasks import Records, sample_unseen
from drpo.train import loop
from drpo.train.config import configure
from drpo.train.rollouts import Rollouts
from drpo.train.setup import only_fitting
from drpo.types import Problem, Sampling
from support.hostile import refused
from support.rollouts import transformers_engine

ASKED = Problem.of_text("7", "1 + 1?", "2")
ENDS = {"eos": "$A <eos>", "both": "<eos> $A <eos>", "two": "$A <eos> <eos>", "another": "$A !"}


def tokenizer_that(template=None, processor=None):
    tokenizer = loading.load_tokenizer("tiny")
    tokenizer.chat_template = template
    if processor:
        specials = [("<eos>", 0), ("!", tokenizer.convert_tokens_to_ids("!"))]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=processor, special_tokens=specials)
    return tokenizer


@pytest.mark.parametrize("how", ENDS)
def test_what_a_tokenizer_appends_is_not_part_of_the_prompt(how):
    tokenizer = tokenizer_that(processor=ENDS[how])
    plain = tokenizer(ASKED.prompt, add_special_tokens=False)["input_ids"]
    assert len(tokenizer(ASKED.prompt)["input_ids"]) > len(plain)
    assert encode_prompt(tokenizer, ASKED).tolist() == [0] * (how == "both") + plain


def test_an_eos_in_the_text_of_a_base_models_prompt_does_not_end_it():
    tokenizer = tokenizer_that()
    assert (
        encode_prompt(tokenizer, Problem.of_text("7", "1 + 1?<eos><eos>", "2")).tolist()
        == tokenizer("1 + 1?")["input_ids"]
    )
    with pytest.raises(InputError, match="problem '7': its prompt '<eos>' has no tokens"):
        encode_prompt(tokenizer, Problem.of_text("7", "<eos>", "2"))


def test_a_template_may_end_turns_with_an_eos_but_not_the_prompt():
    turns = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    assert encode_prompt(tokenizer_that(turns + "{% if add_generation_prompt %}A:{% endif %}"), ASKED)[-3] == 0
    with pytest.raises(InputError, match=r"problem '7': the model's chat template ends the prompt with '<eos>'"):
        encode_prompt(tokenizer_that(turns), ASKED)


def test_a_template_that_refuses_a_system_message_is_named():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}A:"
    assert len(encode_prompt(tokenizer_that(refusing), ASKED)) == 2
    with pytest.raises(
        InputError, match=r"problem '7': .*refuses it: System role not supported; it may do without the system"
    ):
        encode_prompt(tokenizer_that(refusing), Problem.of_text("7", "1 + 1?", "2", system="Be brief."))
    with pytest.raises(InputError, match=r"problem '7': the model's chat template refuses it"):
        encode_prompt(tokenizer_that("{{ messages[5].content + 1 }}{% if %}"), ASKED)
    for broken in ("{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"):
        with pytest.raises(InputError, match=r"problem '7': the model's chat template refuses it"):
            encode_prompt(tokenizer_that(broken), ASKED)


@pytest.mark.parametrize("templated", [None, "{{ messages[-1].content }}A:"])
def test_half_a_character_is_no_text(templated):
    for prompt, system in (("a\ud83d", None), ("1 + 1?", "\udc80")):
        problem = Problem.of_text("7", prompt, "2", system=system)
        if templated is None or system is None:
            with pytest.raises(InputError, match=r"problem '7': its prompt holds half a character, '\\ud"):
                encode_prompt(tokenizer_that(templated), problem)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_half_a_character_in_a_file_is_refused_by_its_line(suffix, tmp_path):
    path = tmp_path / f"data{suffix}"
    whole = [{"q": f"{i} + 1? \U0001f600", "a": str(i)} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, whole)))
    assert len(Records(str(path), "q", "a", holdout=1).sample(3, 0, 0)) == 3
    path.write_text("\n".join(map(json.dumps, [*whole, {"q": "x\ud83d", "a": "1"}])))
    with pytest.raises(InputError, match=r"line 5: '\\ud83d' is half a character"):
        Records(str(path), "q", "a").sample(1, 0, 0)


def absolute(vocabulary=257, positions=16):
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        return GPT2LMHeadModel(config).eval()


def test_limits_of_models():
    llama = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    llama.max_position_embeddings = 16
    assert PromptLimits.of(LlamaForCausalLM(llama)) == PromptLimits(9, 16, False)
    assert PromptLimits.of(absolute()) == PromptLimits(257, 16, True)


def test_a_prompt_that_the_model_cannot_read_is_refused_by_its_problem():
    tokenizer = tokenizer_that()

    def ask(model, prompt, new=4):
        sampling = Sampling(samples=1, max_new_tokens=new)
        transformers_engine(model, tokenizer).generate([Problem.of_text("7", prompt, "2")], sampling, (0,))

    ask(absolute(), "x" * 12)
    with pytest.raises(
        InputError, match=r"problem '7': its prompt has 13 tokens and sampling.max_new_tokens=4, and the model 16"
    ):
        ask(absolute(), "x" * 13)
    model, _ = loading.tiny()
    model.config.max_position_embeddings = 16
    ask(model, "x" * 15)
    with pytest.raises(
        InputError, match=r"problem '7': its prompt has 16 tokens, and the model 16 positions.*--drop-long-prompts"
    ):
        ask(model, "x" * 16)
    with pytest.raises(InputError, match=r"problem '7': its prompt has the token id \d+, .* below 50; .*do not belong"):
        ask(absolute(vocabulary=50), "x")


class Lengths:
    """Problems of 10, 20 and 30 tokens in turn."""

    def sample(self, n, step, seed):
        return [Problem.of_text(f"{step}-{i}", "x" * (10 * ((step * n + i + seed) % 3 + 1)), "") for i in range(n)]


def test_long_prompts_are_dropped_counted_and_replaced():
    model, tokenizer = loading.tiny()
    model.config.max_position_embeddings = 25
    fits = fitting(tokenizer, PromptLimits.of(model), Sampling(samples=2, max_new_tokens=4))
    drawn = sample_unseen(Lengths(), (), 6, 0, 0, fits)
    assert len(drawn) == len({p.id for p in drawn}) == 6 and {len(p.prompt) for p in drawn} == {10, 20}
    run = configure(smoke(), prompts=6, steps=1)
    object.__setattr__(run.data, "task", Lengths())
    rollouts = Rollouts(run, None, (), fits=fits)
    assert all(fits(p) for p in rollouts._problems(0))
    assert rollouts.left_out() >= 2 and rollouts.left_out() == 0
    assert len(only_fitting(Lengths().sample(6, 0, 0), fits)) == 4
    with pytest.raises(InputError, match="all 1 held-out problems are too long"):
        only_fitting(Lengths().sample(3, 0, 0)[2:], fits)
    with pytest.raises(InputError, match="or are too long for the model"):
        sample_unseen(Lengths(), (), 6, 0, 0, lambda problem: False)


def test_a_prompt_that_cannot_fit_is_not_tokenised(monkeypatch):
    model, tokenizer = loading.tiny()
    limits, sampling = PromptLimits.of(model), Sampling(samples=1, max_new_tokens=4)
    monkeypatch.setattr("drpo.rollout.prompts.encode_prompt", lambda *_: pytest.fail("it was tokenised"))
    long = Problem.of_text("7", "x" * 10**6, "")
    assert not fitting(tokenizer, limits, sampling)(long)
    with pytest.raises(InputError, match=r"problem '7': its prompt has 100,000 tokens or more, and the model 2048 pos"):
        encode_prompts(tokenizer, limits, [long], sampling)


def vocabulary(*added, normalizer=None, cut=None, model=None, lost=""):
    """A byte-level tokenizer with a token of 16 bytes, or another."""
    letters = [*(set(pre_tokenizers.ByteLevel.alphabet()) - {*lost}), "aa", "a" * 4, "a" * 8, "a" * 16]
    merges = [("a" * n, "a" * n) for n in (1, 2, 4, 8)]
    bytewise = models.BPE(vocab={token: i for i, token in enumerate(letters)}, merges=merges)
    backend = Tokenizer(model or bytewise)
    backend.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BOUNDED = {
    "bytes": vocabulary(),
    "an added token": vocabulary(AddedToken("a" * 40)),
    "composed": vocabulary(normalizer=normalizers.NFC()),
}
UNBOUNDED = {
    "one token for the unknown": vocabulary(model=models.WordLevel({"?": 0}, unk_token="?")),
    "white space is lost": vocabulary(cut=pre_tokenizers.Whitespace()),
    "white space goes with a token": vocabulary(AddedToken("<end>", lstrip=True)),
    "a normaliser loses letters": vocabulary(normalizer=normalizers.StripAccents()),
}


@pytest.mark.parametrize("how", BOUNDED)
@pytest.mark.parametrize("text", ["a" * 1600, "\u00e9" * 3000, "e\u0301" * 3000, "ab " * 900, " " * 4000])
def test_no_text_has_fewer_tokens_than_the_bound(how, text, monkeypatch):
    monkeypatch.setattr("drpo.rollout.least_tokens.SHORT", 0)
    tokenizer = BOUNDED[how]
    n = len(tokenizer(text)["input_ids"])
    assert 0 < least_tokens(tokenizer, text, 0) <= n
    assert least_tokens(tokenizer, text, n) == 0


@pytest.mark.parametrize("how", UNBOUNDED)
def test_a_tokenizer_that_loses_text_has_no_bound(how):
    assert least_tokens(UNBOUNDED[how], "a " * 10**5, 10) == 0


def test_bytes_that_a_vocabulary_drops_do_not_count(monkeypatch):
    monkeypatch.setattr("drpo.rollout.least_tokens.SHORT", 0)
    tokenizer = vocabulary(lost="z")
    assert tokenizer("z" * 10**4)["input_ids"] == [] and least_tokens(tokenizer, "z" * 10**4, 1) == 0
    assert 1 < least_tokens(tokenizer, "z" * 10**4 + "ab" * 100, 1) <= len(tokenizer("ab" * 100)["input_ids"])


def test_commands_drop_them_or_say_so_in_one_line(tmp_path, monkeypatch):
    rows = [{"q": f"{i} + {i}?", "a": str(2 * i)} for i in range(8)] + [
        {"q": f"{i}" * 2100, "a": "1"} for i in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    task = "records('data.jsonl', 'q', 'a', holdout=8, reward_name='exact_number')"
    assert "--drop-long-prompts" in refused(["eval", "tiny", "--task", task, "--problems", "8"])
    run = configure(smoke(), task=Records("data.jsonl", "q", "a", holdout=8, reward_name="exact_number"))
    run = configure(run, steps=1, prompts=4, updates=1, eval_problems=2, drop_long_prompts=True)
    run = configure(run, sampling=replace(run.rollout.sampling, samples=2, max_new_tokens=4))
    assert loop.train(run, tmp_path / "run", keep_model=False)["finished"]
    records = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    assert records and all(len(json.loads(r)["prompt"]) < 100 for r in records if "prompt" in json.loads(r))
