"""What tests of rollouts, batches and policies share: a tiny model, completions, and a forward pass with no tricks."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from drpo.batch import BatchConfig, make_batches
from drpo.credit import advantages, group_credit
from drpo.model import loading
from drpo.reductions import Horizon
from drpo.types import (
    Batch,
    Episode,
    Generation,
    Layout,
    MicroBatch,
    Problem,
    RewardResult,
    Sampling,
    ScoredGroup,
    TokenSequence,
)
from support.rollouts import transformers_engine

STOPS = frozenset(range(0, 257, 9))
"""About every ninth of the random model's 257 words ends a completion: lengths differ, and some reach the limit."""

PROBLEMS = tuple(Problem.of_text(f"p{i}", "7 + 5 = ?!"[: 1 + 4 * i] * (1 + 2 * i), "12") for i in range(4))
"""Prompts of 1, 15, 45 and 70 bytes."""

REWARDS = ((1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.5, 0.5), (1.0, 1.0, 1.0, 1.0))
"""Two groups that say something, one of them with two samples of advantage 0, and two that say nothing."""


def tiny(stops: frozenset[int] = frozenset()) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh tiny model that `stops` end besides the tokenizer's EOS (which is its padding too), and its tokenizer."""
    model, tokenizer = loading.tiny()
    model.generation_config = GenerationConfig(eos_token_id=sorted({0, *stops}), pad_token_id=0)
    return model, tokenizer


def small(tied: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The smallest Llama whose heads are of a size that vLLM's CPU attention knows; its generation config is a trap."""
    _, tokenizer = loading.tiny()
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=tied, bos_token_id=None,
        eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    trap = {"top_k": 20, "temperature": 0.1, "top_p": 0.5, "repetition_penalty": 1.7, "do_sample": True}
    model.generation_config = GenerationConfig(eos_token_id=sorted(STOPS), pad_token_id=0, **trap)
    return model, tokenizer


def doubled(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64 throughout: transformers' RMS norms would round to float32 inside."""
    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "Qwen3RMSNorm", "MistralRMSNorm"):
            module.forward = partial(_rms_norm, module)
    return model.double()


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem] = PROBLEMS,
    *,
    temperature: float = 1.0,
    samples: int = 4,
    max_new_tokens: int = 12,
    seed: int = 0,
) -> list[Episode]:
    sampling = Sampling(samples=samples, max_new_tokens=max_new_tokens, temperature=temperature)
    return transformers_engine(model, tokenizer).generate(problems, sampling, (seed,))


def grouped(completions: Sequence[Episode], rewards: Sequence[Sequence[float]]) -> list[ScoredGroup]:
    """ScoredGroup i: the completions of the i-th problem, in order, with the i-th rewards."""
    ids = list(dict.fromkeys(c.problem_id for c in completions))
    return [
        ScoredGroup(
            Problem.of_text(i, "", ""), tuple(c for c in completions if c.problem_id == i), tuple(map(RewardResult, r))
        )
        for i, r in zip(ids, rewards, strict=True)
    ]


def batched(groups: Sequence[ScoredGroup], config: BatchConfig) -> list[Batch]:
    """The batches of a rollout whose completions are credited with their reward less the group's mean."""
    return make_batches(groups, group_credit(groups, advantage=advantages.mean), config)


def completion(
    token_ids: Sequence[int], *, prompt_ids: Sequence[int] = (1, 2), problem: str = "p", sample: int = 0
) -> Episode:
    """A completion made by hand, with log-probabilities that are all different."""
    tokens = torch.tensor(token_ids)
    logp = -0.25 - 0.01 * torch.arange(len(tokens)) - 0.1 * sample
    sequence = TokenSequence.of(torch.tensor(prompt_ids), Generation(tokens, logp, "length", version=0))
    return Episode(problem, sample, (), "", "", "length", Sampling(), (len(tokens),), (sequence,))


@torch.no_grad()
def distribution(model: PreTrainedModel, c: Episode, temperature: float) -> Tensor:
    """[N, V] log-probabilities at each of a completion's tokens: one row, no padding, no cache, every logit."""
    ids = torch.cat([c.sequence.prompt_ids, c.sequence.token_ids])
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / temperature, dim=-1)[len(c.sequence.prompt_ids) - 1 : -1]


def own_logp(model: PreTrainedModel, c: Episode, temperature: float) -> Tensor:
    """[N] log-probabilities of a completion's tokens."""
    return distribution(model, c, temperature).gather(-1, c.sequence.token_ids[:, None])[:, 0]


def sees(layout: Layout, position: int) -> list[int]:
    """The positions that one position attends to, in their order, from the definition of a layout."""
    first = [sum(layout.length[:s]) for s in range(len(layout.length))]
    (mine,) = (s for s, f in enumerate(first) if f <= position < f + layout.length[s])
    before = layout.prefix[mine]
    prefix = list(range(first[before], first[before] + layout.length[before])) if before >= 0 else []
    return prefix + list(range(first[mine], position + 1))


def by_sequence(micros: Sequence[MicroBatch], column: Tensor) -> dict[int, Tensor]:
    """The part of a [T] column, T over all of `micros` in order, that belongs to each sequence."""
    sequence = torch.cat([m.sequence for m in micros])
    return {int(s): column[sequence == s] for s in sequence.unique()}


@torch.no_grad()
def perturb(model: PreTrainedModel, scale: float, seed: int = 0) -> PreTrainedModel:
    """Move every trainable weight by noise of this size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def with_logp(c: Episode, behavior_logp: Tensor) -> Episode:
    return with_sequence(c, behavior_logp=behavior_logp)


def with_sequence(e: Episode, **changes: Any) -> Episode:
    return replace(e, sequences=(replace(e.sequence, **changes),))


def how(**changes: object) -> BatchConfig:
    plain = BatchConfig(updates=1, reduction=Horizon(20), micro_batch_tokens=200, skip_zero_advantage=False)
    return replace(plain, **changes)  # type: ignore[arg-type]
