"""What a run of each setting costs, by arithmetic: tokens, operations, memory, GPU hours and rent.

python cluster/verl/cost.py            the table of README.md
python cluster/verl/cost.py --write    puts it there

Nothing here is measured. Operations and bytes follow from the models' shapes and the recipes; hours follow from them by
the three shares in `Hardware`, which are assumptions. Every completion is taken as 8,192 tokens long, the most there
can be: a run whose completions are half as long costs less than half. Left out: sending the weights to the engines,
moving the optimiser's state, rewards, starting up.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

README = Path(__file__).resolve().parent / "README.md"
BEGIN, END = "<!-- cost: begin -->\n", "<!-- cost: end -->\n"

PROMPTS, SAMPLES = 64, 8
PROMPT_TOKENS, NEW_TOKENS = 200, 8192
EVERY, EVAL_PROMPTS, EVAL_SAMPLES = 10, 60, 16
RENT = (
    2,
    5,
)  # dollars an hour of one H100 SXM on demand, the range of providers in May 2026; README.md names the source
STATE_BYTES = 16  # a parameter in training: fp32 weight, gradient and two moments


@dataclass(frozen=True)
class Hardware:
    """One H100 SXM by its data sheet, and how much of it a run is assumed to get.

    Args:
        flops: bf16, dense, operations per second.
        bandwidth: of its memory, bytes per second.
        dense_share: of `flops` in training a dense model; assumed.
        moe_share: of `flops` in training a mixture of experts; assumed.
        bandwidth_share: of `bandwidth` in sampling; assumed.
    """

    flops: float = 989e12
    bandwidth: float = 3.35e12
    dense_share: float = 0.35
    moe_share: float = 0.15
    bandwidth_share: float = 0.5


@dataclass(frozen=True)
class Shape:
    """A model by the numbers of its published configuration.

    Args:
        layers: all of them.
        attention_layers: those with softmax attention; the rest are Gated DeltaNet layers.
        hidden: width.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of each.
        mlp: inner width of a dense MLP or of one expert.
        vocabulary: words.
        experts: of a layer; 0 for a dense MLP.
        active: experts that a token goes through.
        shared: inner width of the expert that all tokens go through.
        gated: whether the attention's output is gated by as many more query channels.
        tied: whether the head is the embedding.
        biased: whether queries, keys and values have biases.
        qk_norm: whether queries and keys are normalised.
        linear: of a DeltaNet layer, (key heads, value heads, head_dim, width of its convolution).
    """

    layers: int
    attention_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    experts: int = 0
    active: int = 0
    shared: int = 0
    gated: bool = False
    tied: bool = False
    biased: bool = False
    qk_norm: bool = True
    linear: tuple[int, int, int, int] | None = None

    def parameters(self) -> int:
        """All of them."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.hidden + self._body(self.experts)

    def active_parameters(self) -> int:
        """Those that a token is multiplied with: the head, not the embedding, and the experts of its choice."""
        return self.vocabulary * self.hidden + self._body(self.active)

    def kv_bytes(self) -> int:
        """Of the keys and values of one token, bf16."""
        return 2 * 2 * self.attention_layers * self.kv_heads * self.head_dim

    def _body(self, experts: int) -> int:
        attention = self.attention_layers * self._attention()
        others = (self.layers - self.attention_layers) * self._delta_net()
        return attention + others + self.layers * (self._mlp(experts) + 2 * self.hidden)

    def _attention(self) -> int:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = self.hidden * (queries * (3 if self.gated else 2) + 2 * keys)
        return projections + (queries + 2 * keys) * self.biased + 2 * self.head_dim * self.qk_norm

    def _delta_net(self) -> int:
        if self.linear is None:
            return 0
        key_heads, value_heads, dim, width = self.linear
        keys, values = key_heads * dim, value_heads * dim
        mixed = 2 * keys + values
        # q, k, v; z; b and a; the way out; the convolution; a decay and a time step for each head; the norm
        return self.hidden * (mixed + 2 * values + 2 * value_heads) + mixed * width + 2 * value_heads + dim

    def _mlp(self, experts: int) -> int:
        if not self.experts:
            return 3 * self.hidden * self.mlp
        shared = 3 * self.hidden * self.shared + (self.hidden if self.shared else 0)
        return experts * 3 * self.hidden * self.mlp + self.hidden * self.experts + shared


QWEN3_4B = Shape(36, 36, 2560, 32, 8, 128, 9728, 151936, tied=True)
QWEN3_30B_A3B = Shape(48, 48, 2048, 32, 4, 128, 768, 151936, experts=128, active=8)
QWEN3_5_35B_A3B = Shape(
    40, 10, 2048, 16, 2, 256, 512, 248320, experts=256, active=8, shared=512, gated=True, linear=(16, 32, 128, 4)
)
R1_DISTILL_1_5B = Shape(28, 28, 1536, 12, 2, 128, 8960, 151936, biased=True, qk_norm=False)


@dataclass(frozen=True)
class Setting:
    """One of the recipes.

    Args:
        name: of its file.
        shape: of its model.
        gpus: that it runs on.
        tensor_parallel: GPUs of one sampling engine.
        recompute: whether the forward pass is run again in the backward pass.
        weight_bytes: of a parameter in sampling.
        steps: rollouts of a run.
    """

    name: str
    shape: Shape
    gpus: int
    tensor_parallel: int
    recompute: bool = True
    weight_bytes: int = 2
    steps: int = 500


_DENSE = Setting("qwen3-4b", QWEN3_4B, gpus=8, tensor_parallel=1)
_MOE = Setting("qwen3-30b-a3b", QWEN3_30B_A3B, gpus=16, tensor_parallel=4)
SETTINGS = (
    _DENSE,
    replace(_DENSE, name="qwen3-4b-authors", gpus=32, steps=800),
    replace(_DENSE, name="qwen3-4b-tools"),
    _MOE,
    replace(_MOE, name="qwen3-30b-a3b-r3"),
    replace(_MOE, name="qwen3-30b-a3b-fp8-rollout", weight_bytes=1),
    replace(_MOE, name="qwen3-30b-a3b-fp8", weight_bytes=1),
    Setting("qwen3.5-35b-a3b", QWEN3_5_35B_A3B, gpus=16, tensor_parallel=8),
    Setting("r1-distill-1.5b", R1_DISTILL_1_5B, gpus=8, tensor_parallel=1),
)


def training_flops(shape: Shape, recompute: bool = True) -> float:
    """Of one row: 6 operations a parameter and token, and 6 for each query channel and pair of positions.

    Gradient checkpointing adds a third. Half of the pairs are causal; two products (scores, values) make up for it.
    DeltaNet's own state is left out: about a hundredth.
    """
    length = PROMPT_TOKENS + NEW_TOKENS
    products = 6 * shape.active_parameters() * length
    attention = 6 * shape.attention_layers * shape.heads * shape.head_dim * length**2
    return (products + attention) * (4 / 3 if recompute else 1)


def sampling_seconds(setting: Setting, rows: int, hardware: Hardware) -> float:
    """Of one batch of rows, all at once: for each token an engine reads its weights, and the cache of each row.

    Where the cache does not hold all rows at full length, some wait, and the weights are read more often.
    """
    shape = setting.shape
    per_engine = rows * setting.tensor_parallel / setting.gpus
    cache = per_engine * shape.kv_bytes() * (PROMPT_TOKENS + NEW_TOKENS / 2)
    token = (shape.parameters() * setting.weight_bytes + cache) / setting.tensor_parallel
    return NEW_TOKENS * token / (hardware.bandwidth * hardware.bandwidth_share)


@dataclass(frozen=True)
class Cost:
    """Of a whole run.

    Args:
        tokens: sampled to train on.
        eval_tokens: sampled to evaluate.
        flops: of training.
        state: bytes of weights, gradients and moments on one GPU.
        train_hours: GPU hours of training.
        sample_hours: GPU hours of sampling, evaluation included.
    """

    tokens: float
    eval_tokens: float
    flops: float
    state: float
    train_hours: float
    sample_hours: float


def cost(setting: Setting, hardware: Hardware | None = None) -> Cost:
    """Return what one setting costs; all methods cost the same."""
    hardware = hardware or Hardware()
    rows, n_evals = PROMPTS * SAMPLES, setting.steps // EVERY + 1
    eval_rows = EVAL_PROMPTS * EVAL_SAMPLES
    flops = setting.steps * rows * training_flops(setting.shape, setting.recompute)
    share = hardware.moe_share if setting.shape.experts else hardware.dense_share
    sampling = setting.steps * sampling_seconds(setting, rows, hardware)
    sampling += n_evals * sampling_seconds(setting, eval_rows, hardware)
    return Cost(
        tokens=setting.steps * rows * NEW_TOKENS,
        eval_tokens=n_evals * eval_rows * NEW_TOKENS,
        flops=flops,
        state=STATE_BYTES * setting.shape.parameters() / setting.gpus,
        train_hours=flops / (hardware.flops * share) / 3600,
        sample_hours=sampling * setting.gpus / 3600,
    )


def table() -> str:
    """The costs of all settings, in Markdown."""
    lines = [
        "| setting | parameters, met by a token | GPUs | training state a GPU | tokens, evaluation | training FLOPs "
        "| GPU h training | GPU h sampling | days | rent, $ |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        c, shape = cost(setting), setting.shape
        hours = c.train_hours + c.sample_hours
        least, most = (round(dollars * hours, -2) for dollars in RENT)
        lines.append(
            f"| `{setting.name}` | {shape.parameters() / 1e9:.2f} B, {shape.active_parameters() / 1e9:.2f} B "
            f"| {setting.gpus} | {c.state / 1e9:.0f} GB | {c.tokens / 1e9:.2f} B, {c.eval_tokens / 1e9:.2f} B "
            f"| {c.flops:.1e} | {c.train_hours:,.0f} | {c.sample_hours:,.0f} | {hours / setting.gpus / 24:.1f} "
            f"| {least:,.0f} to {most:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or write it into the README."""
    if sys.argv[1:] == ["--write"]:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(before + BEGIN + table() + END + rest.split(END)[1])
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
