"""Writes docs/guides/what_fits.md: model x context x what fits, by the doctor's own estimate. Minutes, no weights.

python docs/what_fits.py
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from drpo.model.decoder import decoder_of
from drpo.model.master_weights import hold_in_bfloat16, widen_embeddings
from drpo.model.nf4 import NF4Linear, held_layers
from drpo.model.packed_attention import PACKED
from drpo.model.policy import Policy
from drpo.model.positions import Limit
from drpo.model.precision import Precision
from drpo.model.quantize import decoder_linears
from drpo.ops.chunk_logits import CHUNK_BYTES
from drpo.train.memory import SHARE, StepShape, cache_bytes, estimate_step
from drpo.train.optim import AdamW, AdamW8bit, Optimizer

PAGE = Path(__file__).parent / "guides" / "what_fits.md"
CONTEXTS = {"2k": 2048, "8k": 8192, "32k": 32768}
PROMPT = 512
"""Tokens of each context that are its prompt."""
CARDS = (8, 16, 24, 48, 80)
GIB = 2**30


class Sizes(NamedTuple):
    """The sizes of a model, from its published config.json."""

    config: type[PreTrainedConfig]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool

    def build(self, layers: int) -> PreTrainedConfig:
        """Return the configuration with so many layers."""
        sizes = {name: value for name, value in self._asdict().items() if name != "config"}
        more = {"head_dim": 128} if self.config is Qwen3Config else {}
        return self.config(**{**sizes, "num_hidden_layers": layers}, **more, max_position_embeddings=40_960)


MODELS: Mapping[str, Sizes] = {
    "SmolLM2-135M": Sizes(LlamaConfig, 576, 1536, 30, 9, 3, 49_152, True),
    "Qwen2.5-0.5B": Sizes(Qwen2Config, 896, 4864, 24, 14, 2, 151_936, True),
    "Qwen3-1.7B": Sizes(Qwen3Config, 2048, 6144, 28, 16, 8, 151_936, True),
    "Qwen3-4B": Sizes(Qwen3Config, 2560, 9728, 36, 32, 8, 151_936, True),
    "Llama-3.1-8B": Sizes(LlamaConfig, 4096, 14_336, 32, 32, 8, 128_256, False),
    "Qwen3-8B": Sizes(Qwen3Config, 4096, 12_288, 36, 32, 8, 151_936, False),
    "Qwen2.5-14B": Sizes(Qwen2Config, 5120, 13_824, 48, 40, 8, 152_064, False),
    "Qwen3-14B": Sizes(Qwen3Config, 5120, 17_408, 40, 40, 8, 151_936, False),
}


@dataclass(frozen=True)
class Method:
    """A way to train, with what names it on the command line.

    Args:
        options: as they are typed.
        optimizer: of the policy.
        master_weights: dtype of the weights that are held.
        lora_rank: of the adapters; 0 trains all weights.
        base_precision: of the frozen layers beside adapters.
        checkpointed: layers keep their inputs alone.
    """

    options: str
    optimizer: Optimizer
    master_weights: torch.dtype = torch.float32
    lora_rank: int = 0
    base_precision: str = "fp32"
    checkpointed: bool = True


METHODS: Mapping[str, Method] = {
    "full": Method("--checkpoint-activations off", AdamW(), checkpointed=False),
    "full, checkpointed": Method("--checkpoint-activations on", AdamW()),
    "8-bit": Method("--checkpoint-activations on --optimizer 'adamw8bit(1e-6)'", AdamW8bit()),
    "8-bit, bf16": Method(
        "--checkpoint-activations on --optimizer 'adamw8bit(1e-6)' --master-weights bf16", AdamW8bit(), torch.bfloat16
    ),
    "LoRA": Method(
        "--checkpoint-activations on --lora-rank 16 --master-weights bf16", AdamW(), torch.bfloat16, lora_rank=16
    ),
    "QLoRA": Method(
        "--checkpoint-activations on --lora-rank 16 --master-weights bf16 --base-precision nf4",
        AdamW(),
        torch.bfloat16,
        lora_rank=16,
        base_precision="nf4",
    ),
}
"""In the order of preference."""

HEAD = """<!-- written by docs/what_fits.py -->
# GPU sizing

Model x context x memory of one GPU. **These are estimates, which nobody measured on a GPU**: the figures of the
`memory` line of [`drpo doctor`](../doctor.md), by the same code, from each model's sizes and without weights: for two
and three of its layers, and as much more for each further one. On a CPU that estimate is within 15 % of the measured
peak in ten settings of a tiny model (`tests/test_activations.py`). For your own run ask `drpo doctor`, which counts on
the model itself and on the memory that is free.

What is assumed:

- Products are bf16 (`--precision bf16`). A context is one completion of that length in all, of which 512 tokens are the
  prompt; a micro-batch has the default 4,096 positions, or the one completion where that is longer.
- One process, no critic, no reference model. The sampler is [a server elsewhere](../vllm.md) (`--engine http://...`);
  the last table says what it adds in the same process.
- A cell counts weights, gradient, the optimiser's state, activations and the head, in GiB. It fits where it is at most
  nine tenths of the card's size; the rest is for the CUDA context and fragmentation.
- What loading takes on the GPU is what is held: weights go there in the dtype in which they stay.
"""

SAMPLER = """## A sampler in the same process

`--engine transformers` holds a copy of the weights, here in bf16. During a rollout, when no activations are held, it
holds the keys and values of all completions: `--prompts` times `--sampling.samples` of them.

"""


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Count the head's chunks, and the attention of short rows, as they are on a GPU."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(CHUNK_BYTES, cpu=CHUNK_BYTES["cuda"]))
        stack.enter_context(patch("drpo.model.packed_attention.FEW_SCORES", 0))
        yield


def _imagine(model: PreTrainedModel, mode: FakeTensorMode) -> None:
    """Replace tensors without a device by such that are on a CPU, without numbers, whose products autocast rounds."""
    imagined: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in imagined:
                    with mode:
                        cpu = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        trained = isinstance(tensor, nn.Parameter)
                        imagined[tensor] = nn.Parameter(cpu, tensor.requires_grad) if trained else cpu
                tensors[name] = None if tensor is None else imagined[tensor]


class Weightless(Policy):
    """A policy whose tensors have sizes and no numbers, so that none of a policy's checks can run.

    Args:
        config: the model's.
        method: the way to train.
    """

    def __init__(self, config: PreTrainedConfig, method: Method) -> None:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if method.base_precision == "nf4":
            for name, layer in decoder_linears(model):
                model.set_submodule(name, NF4Linear(layer))
        if method.lora_rank:
            adapters = LoraConfig(r=method.lora_rank, target_modules=r".*\.layers\..*_proj")
            inject_adapter_in_model(adapters, model)
        if method.master_weights == torch.bfloat16:
            hold_in_bfloat16(model)
            widen_embeddings(model)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        _imagine(model, mode)
        model.set_attn_implementation(PACKED)
        decoder = decoder_of(model)
        forward = decoder.forward

        def within_mode(*inputs: Any, **named: Any) -> Any:
            with mode:  # masks are made there, and are large
                return forward(*inputs, **named)

        vars(decoder)["forward"] = within_mode
        self.model, self.precision, self.dtype = model, Precision(torch.bfloat16), torch.bfloat16
        self.limit, self.max_positions, self.shares_prompts = Limit(), None, True


@cache
def policy(
    model: str, layers: int, master_weights: torch.dtype = torch.float32, lora_rank: int = 0, base: str = "fp32"
) -> Policy:
    """Return a model with so many layers that is trained in some way, without weights."""
    return Weightless(MODELS[model].build(layers), Method("", AdamW(), master_weights, lora_rank, base))


def extended(model: str, of_layers: Callable[[int], float]) -> float:
    """Return a figure of the whole model from those with two and with three layers; all layers are alike."""
    two, three = of_layers(2), of_layers(3)
    return two + (MODELS[model].num_hidden_layers - 2) * (three - two)


def needed(model: str, context: str, method: str) -> float:
    """Return the GiB that training takes."""
    how = METHODS[method]
    shape = StepShape(PROMPT, CONTEXTS[context] - PROMPT, prompts=8, samples=8)

    def taken(layers: int) -> float:
        trained = policy(model, layers, how.master_weights, how.lora_rank, how.base_precision)
        optimizer = how.optimizer.build(list(trained.trainable().values()), trained.embeddings())
        need = estimate_step(trained, optimizer, shape, checkpointed=how.checkpointed)
        codes = [tensor for _, layer in held_layers(trained.model) for tensor in (layer.codes, layer.absmax)]
        weights = sum(tensor.nbytes for tensor in [*trained.model.parameters(), *codes])
        return weights + need.dense + need.optimiser + need.activations + need.head

    with as_on_a_gpu():
        return round(extended(model, taken) / GIB, 1)


def n_weights(model: str) -> int:
    """Return how many weights a model has."""
    return round(extended(model, lambda layers: policy(model, layers).model.num_parameters()))


Needs = Mapping[tuple[str, str, str], float]
"""GiB by model, context and method."""


def all_needs() -> Needs:
    """Return the GiB of every cell."""
    return {(m, c, way): needed(m, c, way) for m in MODELS for c in CONTEXTS for way in METHODS}


def fitting(needs: Needs, model: str, context: str, card: int) -> str:
    """Return the first method that fits into a card, or a dash."""
    return next((way for way in METHODS if needs[model, context, way] <= SHARE * card), "-")


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def page(needs: Needs) -> str:
    """Return the whole page."""
    methods = [[way, f"`{how.options}`"] for way, how in METHODS.items()]
    fits = [[m, c, *(fitting(needs, m, c, card) for card in CARDS)] for m in MODELS for c in CONTEXTS]
    gib = [[m, c, *(f"{needs[m, c, way]:.1f}" for way in METHODS)] for m in MODELS for c in CONTEXTS]
    sampler = []
    for name in MODELS:
        weights = n_weights(name)
        token = extended(name, lambda layers, name=name: cache_bytes(policy(name, layers)))
        caches = [f"{n * token / GIB:.2f}" for n in CONTEXTS.values()]
        sampler.append([name, f"{weights / 1e9:.2f}", f"{2 * weights / GIB:.1f}", *caches])
    parts = [
        HEAD,
        "## The first way that fits\n\nThe ways, in the order in which they are tried:\n\n"
        + _table(["way", "options"], methods),
        _table(["model", "context", *(f"{card} GB" for card in CARDS)], fits),
        "A dash: none of them. Then remain [shorter answers, or several GPUs](low_memory.md).",
        "## GiB of each way\n\n" + _table(["model", "context", *METHODS], gib),
        SAMPLER
        + _table(
            ["model", "weights, 10^9", "copy, GiB", *(f"a {c} completion, GiB" for c in CONTEXTS)],
            sampler,
        ),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def read_needs(text: str) -> Needs:
    """Return the GiB that a written page states."""
    section = text.partition("## GiB of each way")[2].partition("\n## ")[0]
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in MODELS and re.fullmatch(r"\d+k", cells[1]):
            found |= {(cells[0], cells[1], way): float(x) for way, x in zip(METHODS, cells[2:], strict=True)}
    return found


if __name__ == "__main__":
    PAGE.write_text(page(all_needs()), encoding="utf-8")
