"""How far the sampler's probabilities are from the trainer's, by the precision of either; no weight ever changes."""

from importlib.util import find_spec
from typing import Any

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.folders import folder
from benchmarks.parts.scale import Scale
from drpo.model.names import SMOLLM2, TINY

ROLLOUTS = ("bf16", "int8", "fp8_weights", "fp8")
VLLM = "vLLM bf16"


def cases(scale: Scale) -> list[Case]:
    """Return a case of samplers against one trainer, and one of trainers for the lowest sampler.

    Args:
        scale: of the machine.
    """
    name = TINY if scale.quick else SMOLLM2
    base = {
        "model": str(folder(name)),
        "reward": "hash",
        "low": 1,
        "high": 50,
        "prompts": 2 if scale.quick else 16,
        "samples": 2 if scale.quick else 8,
        "new_tokens": 4 if scale.quick else 32,
        "learning_rate": 0.0,
    }
    samplers = tuple(_entrant(p, base, rollout=p, trainer="fp32") for p in ROLLOUTS)
    skipped = {}
    if find_spec("vllm"):
        samplers += (_entrant(VLLM, base, rollout="bf16", trainer="fp32", engine="vllm"),)
    else:
        skipped[VLLM] = "skipped: vLLM is not installed beside drpo"
    trainers = tuple(_entrant(f"{p} trainer", base, rollout="fp8", trainer=p) for p in ("bf16", "fp8"))
    parameters = {n: base[n] for n in ("prompts", "samples", "new_tokens")}
    return [
        Case("mismatch", "samplers against the fp32 forward", ROLLOUTS[0], samplers, parameters, skipped),
        Case("mismatch", "trainers of fp8 rollouts", "bf16 trainer", trainers, parameters),
    ]


def _entrant(name: str, base: dict[str, Any], *, rollout: str, trainer: str, engine: str = "transformers") -> Entrant:
    setup = {**base, "precision": trainer, "rollout_precision": rollout, "engine": engine}
    return Entrant(name, Worker(OURS, "drpo_mismatch", setup), {})
