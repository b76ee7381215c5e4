"""What a step costs while one other program keeps a core busy."""

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.parts.scale import Scale
from benchmarks.parts.step import setup_of

UNDISTURBED, BESIDE = "alone", "beside a busy program"


def cases(scale: Scale) -> list[Case]:
    """Return one case: the same step of the same process, alone and beside a program that never waits.

    On two cores its fair share beside the other is one and a third of them, so 1.5 times the time; threads that wait
    for one another lose more.

    Args:
        scale: of the machine.
    """
    setup = setup_of(scale, scale.precisions[0], "full", "hash")
    worker = Worker(OURS, "drpo_neighbours", setup)
    entrants = tuple(Entrant(who, worker, {"neighbours": int(who == BESIDE)}) for who in (UNDISTURBED, BESIDE))
    parameters = {name: setup[name] for name in ("prompts", "samples", "new_tokens", "precision")}
    return [Case("neighbours", f"{scale.precisions[0]}, one busy program beside", UNDISTURBED, entrants, parameters)]
