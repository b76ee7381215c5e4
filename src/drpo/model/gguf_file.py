"""A model and its tokenizer as one GGUF file, which llama.cpp and what is built on it read: Llama and Qwen families.

Names and metadata are those of llama.cpp's own converter. What it would not compute alike is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.files import SCRATCH, naming
from drpo.lazily import lazily
from drpo.model.loading import named_tensors

gguf = lazily("gguf")

FAMILIES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "LLAMA"),
    "qwen2": ("Qwen2ForCausalLM", "QWEN2"),
    "qwen3": ("Qwen3ForCausalLM", "QWEN3"),
}
"""`model_type` -> transformers' class, and the name of GGUF's architecture. SmolLM2 is a Llama."""
TYPES: Mapping[str, tuple[str, str]] = {
    "fp32": ("F32", "ALL_F32"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "fp16": ("F16", "MOSTLY_F16"),
}
"""Name of a dtype -> GGUF's of a matrix, and of a file; vectors are always float32."""

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: Mapping[str, str] = {
    "qwen2": _LETTERS + r"\p{N}" + _OTHERS,
    "llama-bpe": _LETTERS + r"\p{N}{1,3}" + _OTHERS,
}
"""llama.cpp's name of a way to cut a text before byte-pair encoding -> its regular expression."""


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: frozenset[int], path: Path, dtype: str
) -> None:
    """Write a model as a GGUF file, read it back and compare every tensor; the file gets its name once it is verified.

    Args:
        model: a plain transformers model in float32.
        tokenizer: the model's, with its chat template.
        stop: ids of the tokens that end a turn.
        path: of the file; an existing one is replaced.
        dtype: of the matrices: fp32, bf16 or fp16.

    Raises:
        InputError: a model or a tokenizer that llama.cpp would not compute alike, or a file that does not hold them.
    """
    require_written(model, tokenizer)
    matrices, whole = (getattr(gguf, name) for name in ("GGMLQuantizationType", "LlamaFileType"))
    kind = matrices[TYPES[dtype][0]]
    tensors = _tensors(model, kind)
    scratch = path.with_name(path.name + SCRATCH)
    try:
        with naming(path):
            writer = gguf.GGUFWriter(scratch, model.config.model_type)
            _describe_model(writer, model, path.stem, whole[TYPES[dtype][1]])
            _describe_tokens(writer, tokenizer, len(model.get_input_embeddings().weight), stop)
            for name, (data, quantization) in tensors.items():
                writer.add_tensor(name, data, raw_dtype=quantization)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        _require_same(scratch, tensors)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def require_written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise for a model or a tokenizer that cannot be written.

    Raises:
        InputError: another family, a part that llama.cpp computes otherwise, or another kind of tokenizer.
    """
    config: Any = model.config
    kind, name = str(config.model_type), type(model).__name__
    if kind not in FAMILIES or name != FAMILIES[kind][0]:
        known = ", ".join(class_name for class_name, _ in FAMILIES.values())
        raise InputError(f"--gguf: {name} is of a family that is not written; known: {known}")
    rope = config.rope_parameters
    types = ("default", "linear", "llama3") if kind == "llama" else ("default", "linear")
    odd: Mapping[str, tuple[Any, Any]] = {
        "rope_type": (rope.get("rope_type", "default"), lambda value: value not in types),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), lambda value: value != 1.0),
        "hidden_act": (config.hidden_act, lambda value: value != "silu"),
        "layer_types": (getattr(config, "layer_types", None), lambda value: "sliding_attention" in (value or ())),
    }
    for field, (value, is_odd) in odd.items():
        if is_odd(value):
            raise InputError(f"--gguf: {name} with {field}={value!r} is not written; leave --gguf out")
    _pre_tokenizer(tokenizer)
    rows = len(model.get_input_embeddings().weight)
    if max(tokenizer.get_vocab().values()) >= rows:
        raise InputError(f"--gguf: the tokenizer has more tokens than the model embeddings ({rows:,}); they do not fit")


def _describe_model(writer: Any, model: PreTrainedModel, name: str, file_type: Any) -> None:
    """Write the metadata of the model."""
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(len(model.get_input_embeddings().weight))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _describe_tokens(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int, stop: frozenset[int]) -> None:
    """Write the tokenizer: every token with its kind, merges, special tokens and the chat template."""
    backend: Any = _backend(tokenizer)
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(rows)])
    marked = {i: kinds.CONTROL if token.special else kinds.USER_DEFINED for i, token in added.items()}
    writer.add_token_types([marked.get(i, kinds.NORMAL if i in names else kinds.UNUSED) for i in range(rows)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]])
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, token_id in ids.items():
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    further = sorted(stop - {ids["eos"]})
    if further:
        writer.add_eot_token_id(further[0])
    written = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids["bos"] is not None and written[0] == ids["bos"])
    writer.add_add_eos_token(ids["eos"] is not None and written[-1] == ids["eos"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return {} if backend is None else json.loads(backend.to_str())


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return llama.cpp's name of the way in which a byte-level tokenizer cuts a text.

    Raises:
        InputError: another kind of tokenizer, or one that cuts in a way that is not known here.
    """
    backend = _backend(tokenizer)
    model, pre = backend.get("model") or {}, backend.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges"):
        raise InputError(
            f"--gguf: {type(tokenizer).__name__} is no byte-level BPE tokenizer, and others are not written"
        )
    steps = pre.get("pretokenizers", [pre])
    first, last = steps[0], steps[-1]
    at_bytes = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    splits = {pattern: name for name, pattern in SPLITS.items()}
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if at_bytes and last.get("use_regex"):
            return "gpt-2"
        case ["Digits", "ByteLevel"] if at_bytes and last.get("use_regex") and first.get("individual_digits"):
            return "smollm"
        case ["Split", "ByteLevel"] if at_bytes and not last.get("use_regex"):
            pattern = (first.get("pattern") or {}).get("Regex")
            if pattern in splits and first.get("behavior") == "Isolated" and not first.get("invert"):
                return splits[pattern]
    raise InputError(
        f"--gguf: the tokenizer cuts texts in a way that is not written ({json.dumps(pre)[:120]}); known are those of "
        f"GPT-2, SmolLM, Qwen2 and Llama 3"
    )


def _tensors(model: PreTrainedModel, kind: Any) -> dict[str, tuple[Any, Any]]:
    """Return GGUF's tensors by name, in the order of the layers: the data, and its quantization."""
    config: Any = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[FAMILIES[config.model_type][1]], config.num_hidden_layers)
    found: dict[str, tuple[Any, Any]] = {}
    for name, tensor in named_tensors(model).items():
        quantization = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        values = _values(name, tensor, config)
        with np.errstate(over="ignore"):  # which the next line refuses
            data = gguf.quants.quantize(values, quantization)
        if quantization.name == "F16" and not np.isfinite(data).all():
            raise InputError(f"--gguf: {name} has numbers that fp16 does not reach; set --dtype bf16 or fp32")
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = (data, quantization)
    if config.rope_parameters.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = (_rope_factors(model), gguf.GGMLQuantizationType.F32)
    return found


def _values(name: str, tensor: Tensor, config: Any) -> Any:
    """A tensor's numbers as GGUF has them: of a Llama, queries and keys in the order of llama.cpp's rotation."""
    values = tensor.float().cpu().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return values if heads is None or config.model_type != "llama" else interleaved(values, heads)


def interleaved(values: Any, heads: int) -> Any:
    """Return rows in the order of a rotation that turns neighbours, from one that turns halves of a head.

    transformers rotates number i of a head together with number i + d/2, llama.cpp numbers 2i and 2i + 1.

    Args:
        values: [heads * d, ...].
        heads: number of heads.

    Example:
        >>> interleaved(np.array([0, 1, 10, 11]), heads=1).tolist()
        [0, 10, 1, 11]
    """
    rows = values.reshape(heads, 2, -1, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def _rope_factors(model: PreTrainedModel) -> Any:
    """Return by what the frequencies [d/2] of the rotation are divided, from those that the model uses."""
    rotary: Any = model.get_submodule("model.rotary_emb")
    used = rotary.inv_freq.double().cpu()
    i = torch.arange(len(used), dtype=torch.float64)
    plain = model.config.rope_parameters["rope_theta"] ** (-i / len(used))
    return (plain / used).float().numpy()


def _require_same(path: Path, tensors: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise unless a reader finds these tensors in the file, and no others.

    Raises:
        InputError: it does not.
    """
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    odd = sorted(tensors.keys() ^ read.keys()) or [
        name
        for name, (data, quantization) in tensors.items()
        if read[name].tensor_type != quantization or read[name].data.tobytes() != data.tobytes()
    ]
    if odd:
        raise InputError(f"--gguf: what is read back is not what was written: {len(odd)} tensors, {odd[0]!r} first")
