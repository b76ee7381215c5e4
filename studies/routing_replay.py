"""What routing replay cures, changes and costs, on tiny mixtures of experts: `python studies/routing_replay.py --help`.

Three parts, each from models with random weights:

- mismatch: copies in several precisions sample, and the trainer computes the same tokens in float32, with the sampler's
  choice of experts and without;
- runs: a mixture learns to write digits, sampled in fp8, with replay and without;
- costs: time of sampling and of an update, with replay and without, in turns; bytes of a token's choices.

docs/precision.md shows the committed results; `python studies/figures.py` puts them there.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from command import run as run_command
from drpo.batch import pack
from drpo.files import write_text
from drpo.model import loading
from drpo.model.policy import Policy
from drpo.model.precision import FP32, resolve_precision
from drpo.objectives import DRPO
from drpo.rewards import Reward, in_process
from drpo.rollout import TransformersEngine
from drpo.train.config import Run, configure
from drpo.train.loop import train
from drpo.train.optim import AdamW, Constant
from drpo.train.records import METRICS, read_records
from drpo.types import Batch, MicroBatch, Problem, Request, Sampling, TokenSequence

SMALL, LARGER = "2 layers, 2 of 8 experts", "4 layers, 4 of 32 experts"
SIZES = {
    SMALL: dict(num_hidden_layers=2, hidden_size=32, num_experts=8, num_experts_per_tok=2),
    LARGER: dict(num_hidden_layers=4, hidden_size=64, num_experts=32, num_experts_per_tok=4),
}
PRECISIONS = ("bf16", "int8", "fp8_weights", "fp8")
SPREADS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Standard deviations of the initial weights; transformers' own is 0.02."""
SPREAD = 0.2
PROMPTS, SAMPLES, TOKENS = 8, 16, 48
REPEATS = 3
PARTS = ("mismatch", "runs", "costs")
SERIES = ("reward_mean", "prob_diff_mean", "k3", "routing_replaced", "routing_missing")


def mixture(size: str, seed: int, spread: float = SPREAD) -> PreTrainedModel:
    """Return a random Qwen3 mixture over the tiny model's bytes."""
    rest = dict(
        vocab_size=257,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        norm_topk_prob=True,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**rest, **SIZES[size])).eval()


# ---- mismatch ----


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


@dataclass(frozen=True)
class Measured:
    """The mismatch of the same sampled tokens without replay, and with it.

    Args:
        size, precision, spread, seed: of the mixture, its sampler, its initial weights.
        before, after: without replay, and with it.
    """

    size: str
    precision: str
    spread: float
    seed: int
    before: Mismatch
    after: Mismatch


def measure(size: str, precision: str, spread: float, seed: int) -> Measured:
    """Sample with a copy in this precision, and compute the tokens in float32."""
    model = mixture(size, seed, spread)
    batch = _sampled(model, _engine(model, precision, routes=True), seed)
    policy = Policy(model, precision=FP32, temperature=1.0, replays=True)
    before, after = (
        _mismatch([_computed(policy, micro, replays) for micro in batch.micro_batches]) for replays in (False, True)
    )
    return Measured(size, precision, spread, seed, before, after)


def measured(seeds: Sequence[int]) -> Iterator[Measured]:
    """Yield every precision with one spread of initial weights, and every spread with fp8."""
    for size in SIZES:
        cases = [(p, SPREAD) for p in PRECISIONS] + [("fp8", s) for s in SPREADS if s != SPREAD]
        for precision, spread in cases:
            for seed in seeds:
                yield measure(size, precision, spread, seed)


def _engine(model: PreTrainedModel, precision: str, routes: bool) -> TransformersEngine:
    return TransformersEngine(model, precision=resolve_precision(precision, model.device), routes=routes)


def _requests(seed: int) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 257, (8 + 4 * i,), generator=generator) for i in range(PROMPTS)]
    sampling = Sampling(max_new_tokens=TOKENS)
    return [Request(p, sampling, frozenset({0}), (seed, i, j)) for i, p in enumerate(prompts) for j in range(SAMPLES)]


def _sampled(model: PreTrainedModel, engine: TransformersEngine, seed: int) -> Batch:
    requests = _requests(seed)
    drawn = zip(requests, engine.generate(requests), strict=True)
    return pack([TokenSequence.of(r.prompt_ids, g) for r, g in drawn], micro_batch_tokens=4096)


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


@dataclass(frozen=True)
class Learnt:
    """A run.

    Args:
        seed, updates, replay: its settings.
        series: metric -> its value in each step, None where the step has none.
    """

    seed: int
    updates: int
    replay: str
    series: dict[str, list[float | None]]


def learn(folder: Path, seed: int, steps: int, updates: int, replay: str) -> Learnt:
    """Train one mixture, whose initial weights and problems depend on the seed alone."""
    model = folder / f"model-{seed}"
    if not model.exists():
        mixture(SMALL, seed).save_pretrained(model)
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
    of_run = folder / f"{seed}-{updates}-{replay}"
    train(run, of_run, keep_model=False)
    records = read_records(of_run / METRICS)
    return Learnt(seed, updates, replay, {name: [_short(m.get(name)) for m in records] for name in SERIES})


def _short(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.6g}")


def learnt(
    seeds: Sequence[int], steps: int, updates: Sequence[int], done: Container[tuple[object, ...]] = ()
) -> Iterator[Learnt]:
    """Yield the runs that are not done (seed, updates, replay), those to be compared one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for n in updates:
                for replay in ("off", "sampler", *(["trainer"] if n > 1 else [])):
                    if (seed, n, replay) not in done:
                        yield learn(Path(folder), seed, steps, n, replay)


# ---- costs ----


@dataclass(frozen=True)
class Cost:
    """Medians of several turns on one thread, in seconds of the processor, which other programs do not lengthen.

    Args:
        size: of the mixture.
        bytes_per_token: of a token's choices, measured.
        sampling: seconds without reporting experts, and with it.
        update: seconds of forward and backward passes over the same tokens, without replay and with it.
        tokens: sampled tokens of a turn.
    """

    size: str
    bytes_per_token: float
    sampling: tuple[float, float]
    update: tuple[float, float]
    tokens: int


def cost(size: str) -> Cost:
    """Time both sides in turns."""
    torch.set_num_threads(1)
    model = mixture(size, 0)
    plain, reporting = (_engine(model, "bf16", routes) for routes in (False, True))
    batch = _sampled(model, reporting, 0)
    policy = Policy(model, precision=FP32, temperature=1.0, replays=True)
    told = batch.micro_batches
    free = [replace(micro, routes=None) for micro in told]
    routes = [micro.routes for micro in told if micro.routes is not None]
    requests = _requests(0)
    return Cost(
        size,
        sum(r.nbytes for r in routes) / sum(map(len, routes)),
        _in_turns(lambda: plain.generate(requests), lambda: reporting.generate(requests)),
        _in_turns(lambda: _update(policy, free), lambda: _update(policy, told)),
        sum(len(micro.target) for micro in told),
    )


def _update(policy: Policy, micros: Sequence[MicroBatch]) -> None:
    policy.model.zero_grad()
    for micro in micros:
        policy.loss(micro, DRPO(0.2)).loss.backward()


def _in_turns(*deeds: Callable[[], object]) -> tuple[float, float]:
    """Return the median seconds of each of two; the first turn of each is not counted."""
    seconds: list[list[float]] = [[] for _ in deeds]
    for _ in range(1 + REPEATS):
        for deed, own in zip(deeds, seconds, strict=True):
            begin = time.process_time()
            deed()
            own.append(time.process_time() - begin)
    one, other = (statistics.median(own[1:]) for own in seconds)
    return one, other


def _length(run: dict[str, Any]) -> int:
    return len(run["series"]["reward_mean"])


def main(arguments: Sequence[str]) -> int:
    """Measure, and write a JSON file after each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    parser.add_argument("--updates", type=int, nargs="+", default=[1, 4], help="updates per rollout of the runs")
    out = Path("runs/routing_replay.json")
    parser.add_argument("--out", type=Path, default=out, help="other parts in it are kept, and runs of other settings")
    options = parser.parse_args(arguments)
    results: dict[str, list[Any]] = json.loads(options.out.read_text()) if options.out.exists() else {}
    parts: dict[str, Callable[[], Iterator[Any]]] = {
        "mismatch": lambda: measured(options.seeds),
        "runs": lambda: learnt(options.seeds, options.steps, options.updates, done),
        "costs": lambda: map(cost, SIZES),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["seed"], r["updates"], r["replay"]) for r in results.get("runs", ()) if _length(r) == options.steps}
    for part in options.parts:
        results[part] = results.get(part, []) if part == "runs" else []
        for one in parts[part]():
            results[part].append(asdict(one))
            write_text(options.out, json.dumps(results))
            print(f"{part}: {len(results[part])} done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
