"""The head, forward and backward: this project's operators, plain autograd, Liger, CCE, and the products alone."""

from collections.abc import Sequence

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.floor import head_flops
from benchmarks.parts.scale import Scale

# (vocabulary, hidden size): SmolLM2-135M; Qwen2.5-0.5B; Qwen3-4B and its larger relatives.
CPU_SHAPES = ((49_152, 576), (151_936, 896))
CUDA_SHAPES = ((49_152, 576), (151_936, 2_560), (151_936, 4_096))
QUICK_SHAPES = ((512, 32),)
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
QUICK_TOKENS = (64, 128)
BYTES = {"fp32": 4, "bf16": 2}
ROW = 512
"""Tokens of a completion, for objectives and losses that look at completions."""

OPERATORS = {
    "products alone": (OURS, "head", "products"),
    "linear_logprob": (OURS, "head", "linear_logprob"),
    "linear_policy_loss": (OURS, "head", "linear_policy_loss"),
    "log_softmax": (OURS, "head", "log_softmax"),
    "Liger GRPO": ("trl", "liger_head", "liger"),
    "CCE": ("cce", "cce_head", "cce"),
}


def cases(scale: Scale) -> list[Case]:
    """Return a case for each shape, precision and number of tokens.

    Args:
        scale: of the machine.
    """
    shapes: Sequence[tuple[int, int]] = CUDA_SHAPES if scale.cuda else CPU_SHAPES
    lengths: Sequence[int] = TOKENS
    if scale.quick:
        shapes, lengths = QUICK_SHAPES, QUICK_TOKENS
    return [case(scale, v, h, dtype, t) for v, h in shapes for dtype in scale.precisions for t in lengths]


def case(scale: Scale, vocabulary: int, hidden: int, dtype: str, tokens: int) -> Case:
    """Return the case of one shape.

    Args:
        scale: of the machine.
        vocabulary, hidden: shape of the weight.
        dtype: a key of `BYTES`.
        tokens: how many.
    """
    row = min(ROW, QUICK_TOKENS[0]) if scale.quick else ROW
    request = {"tokens": tokens, "vocabulary": vocabulary, "hidden": hidden, "dtype": dtype, "row": row}
    logits = tokens * vocabulary * BYTES[dtype]
    skipped = {}
    if logits > scale.memory_bytes / 4:
        skipped["log_softmax"] = f"skipped: its logits alone are {logits / 2**30:.1f} GiB, over a quarter of the memory"
    entrants = tuple(
        Entrant(name, Worker(environment, module, {}), {**request, "method": method})
        for name, (environment, module, method) in OPERATORS.items()
        if name not in skipped
    )
    parameters = {**request, "logits_bytes": logits, "flops": head_flops(tokens, vocabulary, hidden)}
    name = f"{dtype}, V {vocabulary:,}, H {hidden:,}, T {tokens:,}"
    return Case("head", name, "linear_policy_loss", entrants, parameters, skipped)
