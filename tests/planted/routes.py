"""Mistakes in the replay of experts: which choice belongs to which position, and what is said of those that do not."""

from typing import Any

from planted import Replacement

REPLAY = "tests/test_routing_replay.py::"
NOTHING_CHANGES = f"{REPLAY}test_with_equal_weights_and_precision_nothing_changes[qwen3-0]"
CONFLICTS = f"{REPLAY}test_choices_that_a_shared_prompt_has_no_room_for_are_counted"


def _one_later(right: Any) -> Any:
    def routes(*given: Any) -> Any:
        found, conflicts = right(*given)
        return (None if found is None else found.roll(1, 0)), conflicts

    return routes


def _of_no_row(right: Any) -> Any:
    def routes(*given: Any) -> Any:
        found, _ = right(*given)
        return found, 0

    return routes


def _never_differs(right: Any) -> Any:
    def begin(self: Any, router: Any, routes: Any, differs: Any) -> None:
        right(self, router, routes, differs.clone())

    return begin


REPLACEMENTS = (
    Replacement(
        "each position is told the experts of the one before it", "drpo.batch:_routes", _one_later, (NOTHING_CHANGES,)
    ),
    Replacement("rows that chose other experts are not counted", "drpo.batch:_routes", _of_no_row, (CONFLICTS,)),
    Replacement(
        "all that a router is told counts as its own choice",
        "drpo.model.routing_replay:_Told.__init__",
        _never_differs,
        (f"{REPLAY}test_a_run_replays[sampler-1]", f"{REPLAY}test_replay_cures_the_mismatch_of_an_8_bit_sampler"),
    ),
    Replacement(
        "positions without a choice are not counted",
        "drpo.types.routes:known",
        lambda right: lambda choices: right(choices) | True,
        (f"{REPLAY}test_positions_without_a_choice_are_counted",),
    ),
)
