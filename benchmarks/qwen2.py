"""Random models of Qwen2's shape, made where they are asked for: `--model benchmarks.qwen2:half_billion`."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from drpo.model.device import choose_device

Model = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def half_billion() -> Model:
    """Return a model of 494 million weights in the shape of Qwen2.5-0.5B, and a tokenizer with as many words."""
    return _made(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    )


def tiny() -> Model:
    """Return a model of the same kind that takes a CPU milliseconds.

    Example:
        >>> model, tokenizer = tiny()
        >>> model.config.vocab_size == len(tokenizer), tokenizer.decode(tokenizer("a + b")["input_ids"])
        (True, 'a + b')
    """
    return _made(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


def _made(**shape: int) -> Model:
    config = Qwen2Config(
        **shape,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(), torch.device(choose_device()):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    return model.eval(), _tokenizer(shape["vocab_size"])


def _tokenizer(size: int) -> PreTrainedTokenizerBase:
    """Bytes, and words that no text is split into; each decodes to a text of its own, so that rewards differ."""
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = [*alphabet, *(f"w{i}" for i in range(len(alphabet), size))]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
