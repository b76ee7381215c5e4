"""What sampling in the background gains: on the cores that train too, and where sampling costs them nothing."""

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.folders import folder
from benchmarks.parts.scale import Scale
from drpo.model.names import SMOLLM2, TINY

IN_TURN, OVERLAPPED = "in turn", "overlapped"


def cases(scale: Scale) -> list[Case]:
    """Return a case for each place where the sampler may be; both its entrants do the same run, to the bit.

    Args:
        scale: of the machine.
    """
    setup = {
        "model": str(folder(TINY if scale.quick else SMOLLM2)),
        "precision": scale.precisions[0],
        "reward": "hash",
        "low": 1,
        "high": 50,
        "prompts": 2 if scale.quick else 8,
        "samples": 2 if scale.quick else 8,
        "new_tokens": 4 if scale.quick else 32,
        "learning_rate": 1e-6,
        "steps": 2 if scale.quick else 6,
    }
    away = 0.01 if scale.quick else 3.0
    places = {
        "the sampler shares the trainer's cores": {**setup, "away_s": None},
        f"a stand-in for a sampler elsewhere, {away:g} s a rollout": {**setup, "away_s": away},
    }
    parameters = {n: setup[n] for n in ("prompts", "samples", "new_tokens", "steps")}
    return [
        Case(
            "overlap",
            name,
            IN_TURN,
            tuple(
                Entrant(who, Worker(OURS, "drpo_overlap", its), {"overlap": who == OVERLAPPED})
                for who in (IN_TURN, OVERLAPPED)
            ),
            parameters,
        )
        for name, its in places.items()
    ]
