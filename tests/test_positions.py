"""Models that are not one function of a text beyond some length, and checks that look past a window."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from drpo.doctor.probe_batch import micro_batches, trainer_logp
from drpo.errors import InputError
from drpo.model import loading, packed_attention
from drpo.model.critic import Critic
from drpo.model.policy import Policy
from drpo.model.positions import Limit, narrowed, sequence_limit
from drpo.model.precision import FP32
from drpo.rollout import ServerEngine, decode
from drpo.rollout.decode import PlainDecoder
from drpo.rollout.trial import Way, way_to_decode
from drpo.rollout.vllm import length_options
from drpo.train import setup
from drpo.train.config import configure
from drpo.types import Problem, Sampling
from support.architectures import settings
from support.families import build
from support.rollouts import transformers_engine
from support.tiny_world import completion, own_logp
from support.worlds import tiny_run

BORDER = {"phi3, longrope": 24, "phimoe, longrope": 24, "llama, dynamic": 24, "llama, yarn": None, "llama": None}


def mistral(window: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**settings(sliding_window=window))).eval()


@pytest.fixture(scope="module")
def long() -> PreTrainedModel:
    return build("phi3, longrope")


@pytest.mark.parametrize("family", BORDER)
def test_the_limit_is_where_the_function_changes(family: str):
    """One row's states, alone and beside another that ends at the limit, and one beyond it."""
    model, limit = build(family), BORDER[family]
    assert sequence_limit(model).tokens == limit

    def states(last: int) -> Tensor:
        position = torch.stack([torch.arange(4), torch.arange(last - 3, last + 1)])
        decoder = copy.deepcopy(model).get_decoder()
        with torch.no_grad():
            return decoder(input_ids=torch.arange(1, 5).repeat(2, 1), position_ids=position).last_hidden_state[0]

    border = limit or 200
    torch.testing.assert_close(states(border - 1), states(3), rtol=0, atol=1e-5)
    assert ((states(border) - states(3)).abs().max() > 1e-3) == (limit is not None)


def test_the_trainer_refuses_what_is_longer(long: PreTrainedModel):
    policy, critic = (
        Policy(copy.deepcopy(long), precision=FP32, temperature=1.0), Critic(copy.deepcopy(long), dtype=torch.float32)
    )  # fmt: skip
    short, fits, exceeds = (  # the last token is predicted, not read
        completion(range(1, n), prompt_ids=range(1, 13), sample=i) for i, n in enumerate((4, 13, 15))
    )
    beside_long = trainer_logp(policy, [short, fits])[0]
    torch.testing.assert_close(beside_long, own_logp(long, short, 1.0), rtol=0, atol=1e-5)
    (within,), (beyond,) = micro_batches(policy, [short, fits]), micro_batches(policy, [short, exceeds])
    for taught in (policy, critic):
        taught(within)
        with pytest.raises(InputError, match=r"of 25 tokens.*beyond 24.*longrope"):
            taught(beyond)


def test_the_sampler_refuses_what_may_become_longer(long: PreTrainedModel):
    engine = transformers_engine(long)
    sampling = Sampling(samples=2, max_new_tokens=20)
    engine.generate([Problem.of_text("fits", "7+5=", "")], sampling, (0,))
    with pytest.raises(
        InputError,
        match=r"problem 'exceeds'.*has 5 tokens and sampling.max_new_tokens=20, and the model 24 positions.*longrope",
    ):
        engine.generate([Problem.of_text("fits", "7+5=", ""), Problem.of_text("exceeds", "17+5=", "")], sampling, (0,))


def test_a_run_is_refused_before_its_first_step(long: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "load", lambda name: (copy.deepcopy(long), loading.tiny()[1]))
    run = tiny_run()
    with pytest.raises(InputError, match=r"sampling\.max_new_tokens=24: the model has 24 positions.*longrope"):
        setup.build(configure(run, sampling=replace(run.rollout.sampling, max_new_tokens=24)))
    with pytest.raises(InputError, match=r"problem 'held-out-0': .*the model 24 positions"):  # two bytes of Greek
        setup.build(configure(run, eval_problems=1, sampling=replace(run.rollout.sampling, max_new_tokens=23)))
    setup.build(
        configure(run, eval_problems=1, sampling=replace(run.rollout.sampling, max_new_tokens=22))
    ).driver.engine.close()
    dropping = configure(
        run, drop_long_prompts=True, sampling=replace(run.rollout.sampling, max_new_tokens=23), eval_problems=1
    )
    with pytest.raises(InputError, match="all 1 held-out problems are too long"):
        setup.build(dropping)


def test_vllm_is_given_the_limit_and_what_it_computes_otherwise_is_refused(long: PreTrainedModel):
    assert length_options(Limit(24, "longrope")) == {"max_model_len": 24}
    with pytest.raises(InputError, match="dynamic"):
        length_options(Limit(24, "dynamic"))
    with pytest.raises(InputError, match="longrope"):
        ServerEngine("http://127.0.0.1:9", long)


class OwnRotary(modeling_llama.LlamaRotaryEmbedding):
    """One that counts positions from the end, as somebody's own code may."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        scaled = position_ids.float() / (1 + position_ids.max() / 64)
        return super().forward(x, scaled)


def test_an_unknown_dependence_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**settings(max_position_embeddings=256))).eval()
    model.model.rotary_emb = OwnRotary(model.config)
    with pytest.raises(InputError, match="in a way of its own"):
        Policy(model, precision=FP32, temperature=1.0)


def test_packing_is_checked_past_a_window_that_no_check_could_fill(monkeypatch: pytest.MonkeyPatch):
    assert packed_attention.enable_packed_attention(mistral(4096))
    right = packed_attention._packed_attention
    monkeypatch.setattr(packed_attention, "_packed_attention", lambda *a, sliding_window=None, **k: right(*a, **k))
    assert not packed_attention.enable_packed_attention(mistral(4096))


def test_shared_prompts_are_checked_past_it_too(monkeypatch: pytest.MonkeyPatch):
    model, prompt = mistral(4096), torch.arange(1, 12)
    with narrowed(model):
        assert way_to_decode(model, prompt) is Way.GROUPED
        monkeypatch.setattr(decode, "windows", lambda model: [3, 3])
        monkeypatch.setattr("drpo.rollout.attention.HARMLESS", frozenset())
        assert way_to_decode(model, prompt) is Way.PLAIN


def test_windows_are_put_back_as_they_were():
    model = mistral(4096)
    before = [vars(m).get("sliding_window") for m in model.modules()]
    with narrowed(model):
        assert model.config.sliding_window == 4
    assert model.config.sliding_window == 4096
    assert [vars(m).get("sliding_window") for m in model.modules()] == before


def test_a_cache_that_gives_other_logits_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    right = PlainDecoder.step

    def wrong(self: PlainDecoder, token: Tensor) -> Tensor:
        self.mask[:, -1] = 0  # the newest token is forgotten
        return right(self, token)

    monkeypatch.setattr(PlainDecoder, "step", wrong)
    engine = transformers_engine(*loading.tiny())
    problem, sampling = Problem.of_text("p", "7 + 5 = ?", ""), Sampling(samples=2, max_new_tokens=3)
    for sampled in engine.generate([problem], sampling, (0,)):
        logp = own_logp(engine.model, sampled, 1.0)
        torch.testing.assert_close(sampled.sequence.behavior_logp, logp, rtol=0, atol=2e-5)
    assert engine.way is Way.UNCACHED and "--engine vllm" in caplog.text


def test_padding_that_changes_a_text_is_refused(monkeypatch: pytest.MonkeyPatch):
    model, _ = loading.tiny()
    own = type(model.model).forward

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        out = own(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
        return out

    monkeypatch.setattr(type(model.model), "forward", forward)
    with pytest.raises(InputError, match="padding behind it"):
        packed_attention.require_unseen_padding(model)
