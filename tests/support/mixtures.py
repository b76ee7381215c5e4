"""Tiny mixtures of experts of several families."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from drpo.model.routing import RouteRecorder
from support.architectures import FAMILIES, mixture, settings


def _of(kind: type, config: type, **more: object) -> PreTrainedModel:
    return kind(config(**settings(num_experts_per_tok=2, moe_intermediate_size=32, **more)))


MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": mixture,
    "mixtral": FAMILIES["mixtral, experts"],
    "qwen2, a shared expert": lambda: _of(
        Qwen2MoeForCausalLM, Qwen2MoeConfig, num_experts=8, shared_expert_intermediate_size=32
    ),
    "olmoe": lambda: _of(OlmoeForCausalLM, OlmoeConfig, num_experts=8),
    "granite": lambda: _of(GraniteMoeForCausalLM, GraniteMoeConfig, num_local_experts=8),
    "glm4, a dense layer and groups": lambda: _of(
        Glm4MoeForCausalLM, Glm4MoeConfig, n_routed_experts=8, first_k_dense_replace=1, head_dim=8
    ),
}


def fresh(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MIXTURES[name]().eval()


def in_groups() -> PreTrainedModel:
    """A tiny DeepSeek-V3 whose router takes one of two groups of four experts, then two experts of it."""
    torch.manual_seed(0)
    latent = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8)
    more = settings(n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32)
    config = DeepseekV3Config(**{**more, **latent, "num_key_value_heads": 4, "first_k_dense_replace": 1})
    return DeepseekV3ForCausalLM(config).eval()


@torch.no_grad()
def states(model: PreTrainedModel, ids: Tensor, **more: Tensor) -> Tensor:
    """The last hidden states of one pass over a text, [n, H]."""
    return model.get_decoder()(input_ids=ids[None], use_cache=False, **more).last_hidden_state[0]


def chosen(model: PreTrainedModel, ids: Tensor, **more: Tensor) -> Tensor:
    """[n, L, k]: what the experts are handed in one pass over a text."""
    recorder = RouteRecorder(model)
    with recorder.listening():
        states(model, ids, **more)
        return recorder.take(1)[0]


def for_vllm() -> PreTrainedModel:
    """A tiny Qwen3 mixture with a dense first layer, and heads of a size that vLLM's CPU attention knows."""
    more = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**settings(**more, **experts, mlp_only_layers=[0], max_position_embeddings=1024))
    return Qwen3MoeForCausalLM(config).eval()
