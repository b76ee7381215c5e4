"""Episodes of several turns against one long turn: what later turns cost, with keys and values kept and without."""

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.folders import folder
from benchmarks.parts.scale import Scale
from drpo.model.names import SMOLLM2, TINY

ONE_TURN, KEPT, ANEW, SEPARATE = "one turn", "turns, kept", "turns, read anew", "turns apart"


def cases(scale: Scale) -> list[Case]:
    """Return a case for each length of what is heard between two turns; all its entrants sample equally many tokens.

    The one turn's prompt has what is heard in it too, so that its context is as long at the end. The turns apart are
    rollouts of one turn each, whose prompts are as long as the context of an episode's turn and shared by a group.

    Args:
        scale: of the machine.
    """
    return [_case(scale, heard) for heard in (11, 40)]


def _case(scale: Scale, heard: int) -> Case:
    turns, tokens, prompt = (2, 3, 9) if scale.quick else (4, 16, 150)
    sizes = {"prompts": 2, "samples": 2} if scale.quick else {"prompts": 8, "samples": 8}
    setup = {"model": str(folder(TINY if scale.quick else SMOLLM2)), "precision": scale.precisions[0]}
    episode = {**sizes, "turns": turns, "tokens": tokens, "prompt": prompt, "heard": heard}
    requests = {
        ONE_TURN: {**episode, "turns": 1, "tokens": turns * tokens, "prompt": prompt + (turns - 1) * heard},
        KEPT: episode,
        ANEW: {**episode, "kept": False},
        SEPARATE: {**episode, "apart": True},
    }
    warm = {"tokens": 2, "prompts": 1}
    worker = Worker(OURS, "drpo_turns", setup)
    entrants = tuple(Entrant(name, worker, request, warm) for name, request in requests.items())
    name = f"{turns} turns of {tokens} tokens, {heard} heard between"
    return Case("turns", name, ONE_TURN, entrants, {**episode, "precision": setup["precision"]})
