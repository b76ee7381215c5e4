"""One training step whole: this project against TRL's GRPOTrainer."""

from typing import Any

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.folders import folder
from benchmarks.parts.scale import Scale
from drpo.model.names import SMOLLM2, TINY
from drpo.tasks import Addition

# (regime, reward): in "full" no completion ends early, so both train on exactly as many tokens; a hash of the text as
# the reward leaves no group without an advantage, so that this project skips nothing; "exact" is what training uses.
REGIMES = (("full", "hash"), ("natural", "hash"), ("natural", "exact"))


def cases(scale: Scale) -> list[Case]:
    """Return a case for each precision and regime; the exact reward in the fastest precision alone.

    Args:
        scale: of the machine.
    """
    return [
        _case(scale, precision, regime, reward)
        for precision in scale.precisions
        for regime, reward in REGIMES
        if reward != "exact" or precision == scale.precisions[0]
    ]


def _case(scale: Scale, precision: str, regime: str, reward: str) -> Case:
    setup = setup_of(scale, precision, regime, reward)
    ours = Entrant("drpo", Worker(OURS, "drpo_step", setup), {})
    # In four micro-batches: on 2 cores all at once took 32.4 s a step against 27.7 s, and twice the memory.
    rows = setup["prompts"] * setup["samples"]
    trl = _trl(f"TRL, {rows // 4} x 4", setup, rows // 4, scale.repeats)
    rates = Entrant("matrix products", Worker(OURS, "rates", {}), {"size": _square(scale), "precision": precision})
    shape = {name: setup[name] for name in ("prompts", "samples", "new_tokens", "precision", "reward")}
    parameters = {**shape, "model": TINY if scale.quick else SMOLLM2, "regime": regime}
    return Case("step", f"{precision}, {regime} length, {reward} reward", "drpo", (ours, trl, rates), parameters)


def setup_of(scale: Scale, precision: str, regime: str, reward: str) -> dict[str, Any]:
    """Return what the worker of a step is told; see `REGIMES`."""
    name = TINY if scale.quick else SMOLLM2
    return {
        "model": str(folder(name, endless=regime == "full")),
        "precision": precision,
        "reward": reward,
        "low": 1,
        "high": 50,
        "prompts": 2 if scale.quick else 8,
        "samples": 4 if scale.quick else 8,
        "new_tokens": 4 if scale.quick else 32,
        "learning_rate": 1e-6,
    }


def _trl(name: str, setup: dict[str, Any], batch: int, repeats: int) -> Entrant:
    return Entrant(name, Worker("trl", "trl_step", {**setup, **_dataset(setup, repeats), "batch": batch}), {})


def _dataset(setup: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The problems of the warm-up and of every round, in order: the very ones that this project draws."""
    task = Addition(setup["low"], setup["high"])
    steps = repeats + 1
    problems = [p for step in range(steps) for p in task.sample(setup["prompts"], step, seed=0)]
    return {"problems": [[p.prompt, p.answer] for p in problems], "steps": steps}


def _square(scale: Scale) -> int:
    if scale.quick:
        return 64
    return 8192 if scale.cuda else 2048
