"""What routing replay cures, on tiny mixtures of experts: `python studies/routing_replay.py --help`.

The first table samples with copies of a random mixture in several precisions, and computes the same tokens with the
trainer in float32, with and without the sampler's choice of experts. `--steps` adds runs: a mixture learns to write
digits, sampled in fp8, with and without replay.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from command import run as run_command
from drpo.batch import pack
from drpo.model import loading
from drpo.model.policy import Policy
from drpo.model.precision import FP32, resolve_precision
from drpo.rewards import Reward, in_process
from drpo.rollout import TransformersEngine
from drpo.train.config import Run, configure
from drpo.train.loop import train
from drpo.train.optim import AdamW, Constant
from drpo.train.records import METRICS, read_records
from drpo.types import MicroBatch, Problem, Request, Sampling, TokenSequence

SIZES = {
    "2 layers, 2 of 8 experts": dict(num_hidden_layers=2, hidden_size=32, num_experts=8, num_experts_per_tok=2),
    "4 layers, 4 of 32 experts": dict(num_hidden_layers=4, hidden_size=64, num_experts=32, num_experts_per_tok=4),
}
PRECISIONS = ("bf16", "int8", "fp8_weights", "fp8")
PROMPTS, SAMPLES, TOKENS = 8, 16, 48


def mixture(size: str, seed: int) -> PreTrainedModel:
    """Return a random Qwen3 mixture over the tiny model's bytes."""
    rest = dict(
        vocab_size=257,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        norm_topk_prob=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**rest, **SIZES[size])).eval()


@dataclass(frozen=True)
class Mismatch:
    """How far a trainer is from its sampler.

    Args:
        differs: share of sampled tokens whose experts differ in at least one layer.
        prob_diff: mean |pi - mu|.
        k3: mean of r - 1 - log r, nats.
    """

    differs: float
    prob_diff: float
    k3: float


def measure(size: str, precision: str, seed: int) -> tuple[Mismatch, Mismatch]:
    """Return the mismatch of the same sampled tokens without replay, and with it."""
    model = mixture(size, seed)
    engine = TransformersEngine(model, precision=resolve_precision(precision, model.device), routes=True)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 257, (8 + 4 * i,), generator=generator) for i in range(PROMPTS)]
    sampling = Sampling(max_new_tokens=TOKENS)
    requests = [
        Request(p, sampling, frozenset({0}), (seed, i, j)) for i, p in enumerate(prompts) for j in range(SAMPLES)
    ]
    drawn = zip(requests, engine.generate(requests), strict=True)
    batch = pack([TokenSequence.of(r.prompt_ids, g) for r, g in drawn], micro_batch_tokens=4096)
    policy = Policy(model, precision=FP32, temperature=1.0, replays=True)
    return tuple(  # type: ignore[return-value]
        _mismatch([_computed(policy, micro, replays) for micro in batch.micro_batches]) for replays in (False, True)
    )


@torch.no_grad()
def _computed(policy: Policy, micro: MicroBatch, replays: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return log pi and log mu of the tokens, and whether their experts differ."""
    assert policy.replay is not None and micro.routes is not None
    with policy.replay.recording() as handed:
        logp, _ = policy(micro if replays else replace(micro, routes=None))
        differs = (handed().sort(-1).values != micro.routes.sort(-1).values).flatten(1).any(1)
    return logp, micro.behavior_logp, differs[micro.position]


def _mismatch(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Mismatch:
    logp, mu, differs = (torch.cat(column) for column in zip(*parts, strict=True))
    log_r = (logp - mu).double()
    k3 = (log_r.exp() - 1 - log_r).mean()
    return Mismatch(float(differs.float().mean()), float((logp.exp() - mu.exp()).abs().mean()), float(k3))


def table(seeds: Sequence[int]) -> Iterator[str]:
    """Yield the lines of the first table: medians over the seeds, and how often k3 becomes smaller."""
    yield "| mixture | sampler | tokens whose experts differ | mean abs(pi - mu) | k3 | k3 falls by |"
    yield "|---|---|---|---|---|---|"
    for size in SIZES:
        for precision in PRECISIONS:
            pairs = [measure(size, precision, seed) for seed in seeds]
            before, after = zip(*pairs, strict=True)
            falls = sorted(b.k3 / a.k3 for b, a in pairs)
            cells = [
                f"{_median(before, name):{form}} -> {_median(after, name):{form}}"
                for name, form in (("differs", ".1%"), ("prob_diff", ".1e"), ("k3", ".1e"))
            ]
            by = f"{statistics.median(falls):.1f} ({falls[0]:.1f} to {falls[-1]:.1f})"
            yield f"| {size} | {precision} | {' | '.join(cells)} | {by} |"


def _median(of: Sequence[Mismatch], name: str) -> float:
    return float(statistics.median(getattr(m, name) for m in of))


# ---- runs ----


@in_process
def digits(problem: Problem, text: str) -> float:
    """Return the share of characters that are digits."""
    return sum(c.isdigit() for c in text) / max(1, len(text))


@dataclass(frozen=True)
class Letters:
    """Problems that are single letters; the answer is to be digits."""

    @property
    def reward(self) -> Reward:
        """Of a completion."""
        return digits

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Return a step's problems; see `Task.sample`."""
        return [Problem.of_text(f"{step}-{i}", chr(ord("a") + (seed + step * n + i) % 26), "") for i in range(n)]

    def held_out(self, n: int) -> list[Problem]:
        """Return problems that are never trained on; see `Task.held_out`."""
        return [Problem.of_text(f"held-out-{i}", chr(ord("A") + i % 26), "") for i in range(n)]


def learn(folder: Path, size: str, seed: int, steps: int, updates: int, replay: str) -> str:
    """Train one mixture, and return its row of the second table."""
    name = f"{seed}-{updates}-{replay}"
    model = folder / f"model-{seed}"
    if not model.exists():
        mixture(size, seed).save_pretrained(model)
        loading.load_tokenizer("tiny").save_pretrained(model)
    run = configure(
        Run(),
        model=str(model),
        task=Letters(),
        seed=seed,
        steps=steps,
        updates=updates,
        prompts=8,
        precision="fp32",
        rollout_precision="fp8",
        routing_replay=replay,
        optimizer=AdamW(3e-3),
        schedule=Constant(),
        sampling=Sampling(samples=8, max_new_tokens=16),
        eval_problems=0,
        checkpoint_every=0,
    )
    train(run, folder / name, keep_model=False)
    metrics = read_records(folder / name / METRICS)
    last = metrics[-max(1, steps // 10) :]
    figures = [
        f"{statistics.fmean(m['reward_mean'] for m in last):.3f}",
        f"{statistics.fmean(m['reward_mean'] for m in metrics):.3f}",
        f"{statistics.fmean(m['k3'] for m in metrics if 'k3' in m):.1e}",
        f"{statistics.fmean(m.get('routing_replaced', 0.0) for m in metrics):.1%}" if replay != "off" else "",
    ]
    return f"| {seed} | {updates} | {replay} | {' | '.join(figures)} |"


def main(arguments: Sequence[str]) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=0, help="steps of each run; 0 makes the first table alone")
    parser.add_argument("--updates", type=int, nargs="+", default=[1], help="updates per rollout of the runs")
    options = parser.parse_args(arguments)
    if not options.steps:
        for line in table(options.seeds):
            print(line, flush=True)
        return 0
    print("| seed | updates | replay | reward, last tenth | reward, all steps | k3 | replaced |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for updates in options.updates:
            for seed in options.seeds:
                for replay in ("off", "sampler", *(["trainer"] if updates > 1 else [])):
                    size = next(iter(SIZES))
                    print(learn(Path(folder), size, seed, options.steps, updates, replay), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
