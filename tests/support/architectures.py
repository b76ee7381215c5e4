"""Tiny random models of several architectures, for tests that run any causal LM."""

from collections.abc import Callable

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def settings(**more: object) -> dict[str, object]:
    common = dict(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return {**common, **more}


def mixture() -> PreTrainedModel:
    """A tiny Qwen3 mixture of 8 experts, 2 to a token; the same at every call."""
    experts = settings(moe_intermediate_size=32, head_dim=8, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**experts)).eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**settings(head_dim=8))),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**settings(sliding_window=8))),
    "gemma3, mixed windows": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**settings(head_dim=8, sliding_window=8))),
    "mixtral, experts": lambda: MixtralForCausalLM(MixtralConfig(**settings(num_local_experts=4))),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2,
                   bos_token_id=0, eos_token_id=0)
    ),
}  # fmt: skip
"""A few of different kinds, for tests that take long."""

GROUPED: dict[str, Callable[[], PreTrainedModel]] = {
    **FAMILIES,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**settings())),
    "llama, one key-value head": lambda: LlamaForCausalLM(LlamaConfig(**settings(num_key_value_heads=1))),
    "qwen2, biases": lambda: Qwen2ForCausalLM(Qwen2Config(**settings())),
    "qwen2, a window in one layer": lambda: Qwen2ForCausalLM(
        Qwen2Config(**settings(use_sliding_window=True, sliding_window=8, max_window_layers=1))
    ),
}
"""Those whose samples share their prompt's keys."""

PLAIN: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2, soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**settings(head_dim=8, sliding_window=8, attn_logit_softcapping=1.0, attn_implementation="eager"))
    ),
}
"""Those whose attention does more."""
