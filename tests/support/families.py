"""Every family of causal LMs in transformers, tiny: built from its configuration class, sampled, trained on, saved."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drpo.doctor.probe_batch import trainer_logp
from drpo.model import loading
from drpo.model.loading import named_tensors, reader_of
from drpo.model.policy import Policy
from drpo.model.saving import probe, save_model
from drpo.rollout import TransformersEngine
from drpo.types import Problem, Sampling
from support.tiny_world import own_logp

SIZES: Mapping[str, Any] = dict(
    vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, moe_intermediate_size=16, num_experts=4,
    n_routed_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_num_experts=4, moe_k=2, moe_topk=2,
    first_k_dense_replace=1, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8, sliding_window=6, shared_expert_intermediate_size=16, n_shared_experts=1,
    num_shared_experts=1, num_nextn_predict_layers=0, n_embd=32, n_layer=2, n_head=4, n_positions=256, d_model=32,
    n_layers=2, n_heads=4, max_seq_len=256, ffn_dim=48, word_embed_proj_dim=32, decoder_layers=2,
    decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48,
    bos_token_id=0, eos_token_id=0, pad_token_id=0, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    shared_intermediate_size=16, index_head_dim=16, index_n_heads=2, index_topk=128, attention_chunk_size=6,
    vocab_size_per_layer_input=257, hidden_size_per_layer_input=8, initializer_range=0.2,
)  # fmt: skip
"""What is set wherever a family's configuration has it."""

VISION: Mapping[str, Any] = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    image_size=28, patch_size=14, depth=1, num_heads=2, out_hidden_size=32, num_position_embeddings=16,
    position_embedding_size=16, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16,
    deepstack_visual_indexes=(0,), fullatt_block_indexes=(0,),
)  # fmt: skip
"""The same for what reads images, which no text runs through."""

LATENT = (
    "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3",
)  # fmt: skip
MLA = dict(num_key_value_heads=4, head_dim=8)
ROPE = dict(rope_theta=10000.0, original_max_position_embeddings=8)
LONGROPE = ROPE | dict(
    rope_type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[4.0, 5.0, 6.0, 7.0],
    original_max_position_embeddings=24,
)  # fmt: skip
LLAMA3 = ROPE | dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
MROPE = dict(rope_parameters=dict(rope_theta=10000.0, mrope_section=[2, 1, 1]))
TEMPERED = dict(no_rope_layers=[1, 0], floor_scale=16)
SHARED_KEYS = dict(
    num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2
)  # fmt: skip
DELTA = dict(layer_types=["linear_attention", "full_attention"])
OWN: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(LATENT, MLA),
    "codegen": dict(rotary_dim=8),
    "gptj": dict(rotary_dim=8),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "qwen3_5", "qwen3_5_moe"), DELTA),
    "bamba": dict(attn_layer_indices=[1], mamba_chunk_size=8),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_chunk_size=8),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], mamba_chunk_size=8),
    **dict.fromkeys(("llama4", "llama4_text"), TEMPERED),
    "gemma4, experts": dict(enable_moe_block=True, top_k_experts=2),
    "gemma4_text, shared keys": SHARED_KEYS,
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": DELTA | MLA | dict(linear_head_dim=8, linear_num_heads=4, num_experts_per_tok=2),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=1, state_size=8, chunk_size=8),
    "minicpm3": MLA | dict(dim_model_base=64),
    "minimax": dict(block_size=8),
    "nemotron_h": dict(
        layers_block_type=["mamba", "moe", "attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=8,
        ssm_state_size=8,
    ),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"]),
    "zamba2": dict(
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        chunk_size=8,
        n_mamba_heads=4,
    ),
    "llama, dynamic": dict(
        max_position_embeddings=24, rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)
    ),
    "llama, linear": dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0)),
    "llama, llama3": dict(rope_parameters=LLAMA3),
    "llama, yarn": dict(rope_parameters=ROPE | dict(rope_type="yarn", factor=4.0)),
    "gemma3n_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0, 0.0],
        intermediate_size=[48, 48],
    ),
    "gemma3n_text, shared keys": SHARED_KEYS
    | dict(
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0],
        intermediate_size=[48] * 4,
    ),
    "qwen2_vl": MROPE,
    "qwen2_5_vl": MROPE,
    "phi3, longrope": dict(original_max_position_embeddings=24, rope_parameters=LONGROPE),
    "phimoe, longrope": dict(rope_parameters=LONGROPE | dict(short_mscale=1.1, long_mscale=1.3)),
}
"""What a family needs besides; borders of rotary embeddings stand within what is sampled."""

WIDER: Mapping[str, Any] = dict(
    hidden_size=128, intermediate_size=128, head_dim=32, moe_intermediate_size=64, shared_intermediate_size=64,
    shared_expert_intermediate_size=64, n_embd=128, d_model=128, ffn_dim=128, word_embed_proj_dim=128, mamba_d_head=64,
    linear_key_head_dim=32, linear_value_head_dim=32,
)  # fmt: skip
WIDER_MLA = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, head_dim=64)
WIDER_OWN: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(LATENT, WIDER_MLA),
    "codegen": dict(rotary_dim=32),
    "falcon_h1": dict(mamba_d_ssm=256),
    "gemma3n_text": dict(intermediate_size=[128, 128]),
    "gemma3n_text, shared keys": dict(intermediate_size=[128] * 4),
    "gptj": dict(rotary_dim=32),
    "mamba2": dict(head_dim=64),
    "nemotron_h": dict(mamba_head_dim=64),
    "phi3, longrope": dict(rope_parameters=LONGROPE | dict(short_factor=[1.1] * 16, long_factor=[4.0] * 16)),
}
"""For vLLM, whose kernels for CPUs know heads from 32 numbers on."""

FAMILIES = tuple(
    """
afmoe; apertus; arcee; aria_text; axk1; axk2; bamba; bart; bert; biogpt; bitnet; bloom; codegen; cohere; cohere2; cwm;
deepseek_v2; deepseek_v3; deepseek_v32; diffllama; doge; dots1; ernie4_5; ernie4_5_moe; exaone4; exaone_moe; falcon;
falcon_h1; falcon_mamba; flex_olmo; fuyu; gemma; gemma2; gemma3; gemma3_text; gemma3n_text; gemma3n_text, shared keys;
gemma4; gemma4, experts; gemma4_text; gemma4_text, shared keys; glm; glm4; glm4_moe; glm4_moe_lite; glm_moe_dsa; gpt2;
gpt_bigcode; gpt_neox; gpt_neox_japanese; gpt_oss; gptj; granite; granite_swa; granitemoe; granitemoe_swa;
granitemoehybrid; granitemoeshared; helium; hrm_text; hunyuan_v1_dense; hunyuan_v1_moe; hy_v3; hy_v4; hyperclovax;
internvl; jais2; jamba; jetmoe; kimi_linear; laguna; lfm2; lfm2_moe; llama; llama, dynamic; llama, linear;
llama, llama3; llama, yarn; llama4; llama4_text; llava; mamba; mamba2; mellum; mimo_v2_flash; minicpm3; minimax;
minimax_m2; minimax_m3_vl_text; ministral; ministral3; mistral; mistral3; mixtral; modernbert-decoder; moshi; mpt;
nanochat; nemotron; nemotron_h; olmo; olmo2; olmo3; olmo_hybrid; olmoe; opt; persimmon; phi; phi3; phi3, longrope;
phimoe; phimoe, longrope; qwen2; qwen2_5_vl; qwen2_moe; qwen2_vl; qwen3; qwen3_5; qwen3_5_moe; qwen3_5_moe_text;
qwen3_5_text; qwen3_moe; qwen3_next; qwen3_vl; recurrent_gemma; rwkv; seed_oss; smollm3; solar_open; stablelm;
starcoder2; trocr; vaultgemma; whisper; xglm; xlstm; zamba; zamba2
""".strip()
    .replace("\n", " ")
    .split("; ")
)
"""Those of the table: transformers' model type, and after a comma what is special."""

PROBLEMS = (Problem.of_text("short", "7+5=", "12"), Problem.of_text("long", "What is 7 + 5?", "12"))
SAMPLING = Sampling(samples=2, max_new_tokens=10)
"""Prompts of 4 and 14 tokens, so that windows of 6 are crossed in the prompt, at its end and in the completion."""


def build(family: str, *, wider: bool = False) -> PreTrainedModel:
    """A tiny model with random numbers in every parameter and persistent buffer, zeros nowhere; always the same."""
    kind, _, _ = family.partition(",")
    torch.manual_seed(0)
    default, own, usual = AutoConfig.for_model(kind), OWN.get(family, {}), SIZES
    if wider:
        own, usual = {**own, **WIDER_OWN.get(family, {})}, {**SIZES, **WIDER}
    if "vision_config" not in default.sub_configs:
        config = AutoConfig.for_model(kind, **{**_sizes(default, usual), **own})
    else:
        vision = default.vision_config or default.sub_configs["vision_config"]()
        parts = {"text_config": default.text_config, "vision_config": vision}
        sizes = {"text_config": {**_sizes(default.text_config, usual), **own}, "vision_config": _sizes(vision, VISION)}
        config = AutoConfig.for_model(kind, **{n: {"model_type": p.model_type} | sizes[n] for n, p in parts.items()})
        config.architectures = [AutoModelForMultimodalLM._model_mapping[type(config)].__name__]
    return stirred(reader_of(config).from_config(config, dtype=torch.float32).eval(), 0.1)


def _sizes(default: PreTrainedConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in sizes.items() if k in vars(default) and not (v == 6 and vars(default)[k] is None)}


@torch.no_grad()
def stirred(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    """Move every parameter and persistent buffer that is a number; ids stay."""
    generator = torch.Generator().manual_seed(1)
    derived = ("slope_rate", "_decay")  # MiniMax's buffers follow from each other
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point() and not name.endswith(derived):
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    return model


@torch.no_grad()
def stir_adapters(policy: Policy) -> None:
    """A new adapter's second factor is 0."""
    for p in policy.trainable().values():
        p.add_(0.1 * torch.randn(p.shape))


@torch.no_grad()
def widest(policy: Policy, engine: TransformersEngine, tokenizer: PreTrainedTokenizerBase) -> float:
    """Hand the weights over, sample, save, read back; the largest difference of any two log-probabilities."""
    engine.load_weights(policy.state(), version=1)
    completions = engine.generate(PROBLEMS, SAMPLING, (0,))
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "model"
        save_model(policy.plain(), tokenizer, saved, policy.logits(probe(policy.model)))
        read, _ = loading.load(str(saved))
    assert type(read) is type(policy.model)
    columns = [
        torch.cat(column)
        for column in (
            trainer_logp(policy, completions),
            [c.sequence.behavior_logp for c in completions],
            [own_logp(read, c, 1.0) for c in completions],
            [own_logp(policy.plain(), c, 1.0) for c in completions],
        )
    ]
    table = torch.stack(columns)
    return float((table.amax(0) - table.amin(0)).max())
