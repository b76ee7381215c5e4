"""Tiny random models of several architectures, for tests that run any causal LM."""

from collections.abc import Callable

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
)


def _settings(**more: object) -> dict[str, object]:
    settings = dict(
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
    return {**settings, **more}


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_settings(head_dim=8))),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**_settings(sliding_window=8))),
    "gemma3, mixed windows": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_settings(head_dim=8, sliding_window=8))),
    "mixtral, experts": lambda: MixtralForCausalLM(MixtralConfig(**_settings(num_local_experts=4))),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2,
                   bos_token_id=0, eos_token_id=0)
    ),
}  # fmt: skip
"""A few of different kinds, for tests that take long."""

GROUPED: dict[str, Callable[[], PreTrainedModel]] = {
    **FAMILIES,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_settings())),
    "llama, one key-value head": lambda: LlamaForCausalLM(LlamaConfig(**_settings(num_key_value_heads=1))),
    "qwen2, biases": lambda: Qwen2ForCausalLM(Qwen2Config(**_settings())),
    "qwen2, a window in one layer": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_settings(use_sliding_window=True, sliding_window=8, max_window_layers=1))
    ),
}
"""Those whose samples share their prompt's keys."""

PLAIN: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2, soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_settings(head_dim=8, sliding_window=8, attn_logit_softcapping=1.0, attn_implementation="eager"))
    ),
}
"""Those whose attention does more."""
