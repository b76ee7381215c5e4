"""What an update costs in time and saves in memory where layers are computed again in the backward pass."""

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.folders import folder
from benchmarks.parts.scale import Scale
from drpo.model.names import SMOLLM2, TINY

SIZES = (
    {"prompts": 1, "samples": 2, "prompt_tokens": 48, "new_tokens": 1000},
    {"prompts": 1, "samples": 8, "prompt_tokens": 48, "new_tokens": 250},
    {"prompts": 1, "samples": 8, "prompt_tokens": 192, "new_tokens": 1000},
)
"""Two of 2,048 positions, in rows as long as PyTorch's attention takes and in shorter ones; one of 8,192.

A CPU measures the first alone, which takes it minutes.
"""
QUICK_SIZES = ({"prompts": 1, "samples": 2, "prompt_tokens": 8, "new_tokens": 60},)
WARM_UP = {"new_tokens": 16}
"""Enough for the optimiser's moments to be there, so that no round pays for them."""


def cases(scale: Scale) -> list[Case]:
    """Return a case for each size; `off` keeps all activations, `on` computes layers again.

    Args:
        scale: of the machine.
    """
    setup = {
        "model": str(folder(TINY if scale.quick else SMOLLM2)),
        "precision": scale.precisions[0],
        "reward": "hash",
        "low": 1,
        "high": 50,
        "prompts": 1,
        "samples": 8,
        "new_tokens": 1000,
        "learning_rate": 1e-6,
        "micro_batch_tokens": 8192,
    }
    sizes = QUICK_SIZES if scale.quick else SIZES if scale.cuda else SIZES[:1]
    found = []
    for size in sizes:
        entrants = tuple(
            Entrant(setting, Worker(OURS, "drpo_growth", {**setup, "checkpoint_activations": setting}), size, WARM_UP)
            for setting in ("off", "on")
        )
        name = f"{size['samples']} answers of {size['new_tokens']:,} tokens to a prompt of {size['prompt_tokens']}"
        found.append(Case("checkpointing", name, "off", entrants, size))
    return found
