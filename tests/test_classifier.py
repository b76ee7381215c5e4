"""A transformers sequence classifier as a reward model."""

import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from drpo.errors import InputError
from drpo.model import loading
from drpo.rewards import REGISTRY, RewardPool
from drpo.rewards.classifier import Classifier
from drpo.spec import format_spec, parse_spec
from drpo.types import Problem

QUESTION = Problem.of_text("7", "1 + 1?", "2")
TEXTS = ["2", "It is two, I think.", "no", "", "It is three, I know", "2"]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


def saved(folder, n_labels=1, pad=256, template=None, kind=LlamaForSequenceClassification):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=n_labels, pad_token_id=pad, initializer_range=0.5,
    )  # fmt: skip
    model, tokenizer = kind(config).eval(), loading.load_tokenizer("tiny")
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model, tokenizer


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("reward_model"), template=TEMPLATE)


def scores(reward, texts=TEXTS):
    with RewardPool(reward) as pool:
        assert pool._pool is None  # in this process: the model is sent nowhere
        return pool.score([(QUESTION, text) for text in texts])


@pytest.mark.parametrize("pad", [256, ord("k"), None])
def test_scores_are_the_models_one_by_one_however_they_are_batched(reward_model, pad, tmp_path):
    """With padding, with padding that is also the end of a text, and without any."""
    name, model, tokenizer = reward_model if pad == 256 else saved(tmp_path, pad=pad, template=TEMPLATE)
    for reads, prompt in (("auto", "[user] 1 + 1?[assistant] "), ("completion", "")):
        found = scores(Classifier(name, reads=reads, batch=4))
        with torch.no_grad():
            model.config.pad_token_id = None  # the last token counts
            ids = [torch.tensor([tokenizer(prompt + text)["input_ids"]]) for text in TEXTS]
            wanted = [pytest.approx(float(model(i).logits), abs=1e-5) if i.numel() else None for i in ids]
        model.config.pad_token_id = pad
        assert [m.score for m in found] == wanted


def test_what_the_model_cannot_read_is_a_failure_and_costs_its_own_score_only(reward_model):
    found = scores(Classifier(reward_model[0]), ["2", "x" * 100, "3"])
    assert [m.score is None for m in found] == [False, True, False]
    assert "tokens, more than the 64 that the model reads" in found[1].failure.text


def test_a_label_has_a_probability(tmp_path):
    name, _, _ = saved(tmp_path, n_labels=3)
    both = [scores(Classifier(name, label)) for label in ("LABEL_0", "LABEL_1", "LABEL_2")]
    for of_one in zip(*both, strict=True):
        assert sum(m.score for m in of_one) == pytest.approx(1) and all(0 < m.score < 1 for m in of_one)
    for label, message in (("", "must be one of LABEL_0, LABEL_1"), ("LABEL_3", "label='LABEL_3'; did you mean")):
        with pytest.raises(InputError, match=message):
            scores(Classifier(name, label))


def test_what_cannot_be_is_refused(tmp_path, reward_model):
    saved(tmp_path, kind=LlamaForCausalLM)
    for reward, message in (
        (Classifier(str(tmp_path)), "has no trained score.weight, so it is no sequence classifier"),
        (Classifier(str(tmp_path / "no")), "no such folder; give a sequence classifier's, or a hub id, owner/name"),
        (Classifier("tiny"), "classifier: model='tiny': no such folder"),
        (Classifier(reward_model[0], device="no"), "device='no': "),
    ):
        with pytest.raises(InputError, match=message):
            scores(reward)
    for arguments in ("''", "'m', dtype='fp8'", "'m', reads='all'", "'m', batch=0"):
        with pytest.raises(InputError):
            parse_spec(f"classifier({arguments})", REGISTRY)


def test_it_is_written_as_a_spec_and_travels_without_its_model(reward_model):
    reward = parse_spec(f"classifier('{reward_model[0]}', batch=2)", REGISTRY)
    reward.start()
    assert parse_spec(format_spec(reward, REGISTRY), REGISTRY) == reward
    assert len(pickle.dumps(reward)) < 1000
