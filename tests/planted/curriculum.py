"""Mistakes in what a curriculum knows, and in what it draws."""

from typing import Any

from planted import Replacement

HERE = "tests/test_curriculum.py::"
RESUMED = f"{HERE}test_killed_and_resumed_is_one_run_bit_for_bit"
CHOSEN = f"{HERE}test_a_rollout_is_chosen_from_the_results_that_are_there_when_it_begins"
ATTEMPTS = f"{HERE}test_attempts_count_and_every_place_says_the_same"
VERIFIED = f"{HERE}test_verify_compares_the_pass_rates_with_the_records"


def _of_the_next(right: Any) -> Any:
    def observe(state: Any, step: int, results: Any) -> Any:
        names = [*results]
        return right(state, step, dict(zip([*names[1:], *names[:1]], results.values(), strict=True)))

    return observe


def _unkeyed(right: Any) -> Any:
    def derive(*parts: Any) -> int:
        import random

        return random.getrandbits(63)

    return derive


def _observed_late(right: Any) -> Any:
    """A rollout begins before the last step's results are taken in."""

    def choose(rule: Any, state: Any, ids: Any, n: int, step: int, *rest: Any) -> Any:
        from dataclasses import replace

        known = {name: replace(p, means=p.means[:-1]) for name, p in state.problems.items()}
        chosen = right(rule, replace(state, problems=known), ids, n, step, *rest)
        problems = {
            n: replace(p, means=state.problems[n].means if n in known else ()) for n, p in chosen.problems.items()
        }
        return replace(chosen, problems=problems)

    return choose


REPLACEMENTS = (
    Replacement(
        "what a curriculum has measured is lost at a resume",
        "drpo.train.rollouts:read_curriculum",
        lambda right: lambda folder: None,
        (RESUMED,),
    ),
    Replacement(
        "results are counted for another problem of the rollout",
        "drpo.train.curriculum:observe",
        _of_the_next,
        (ATTEMPTS, VERIFIED, f"{HERE}test_groups_that_were_sampled_again_count_and_a_group_without_a_score_does_not"),
    ),
    Replacement(
        "a curriculum draws with numbers that have no key",
        "drpo.train.curriculum:derive",
        _unkeyed,
        (f"{HERE}test_the_seed_and_the_step_alone_decide", RESUMED),
    ),
    Replacement(
        "a rollout is chosen without the newest results",
        "drpo.train.curriculum:choose",
        _observed_late,
        (CHOSEN,),
    ),
    Replacement(
        "attempts that were sampled again are not counted",
        "drpo.train.rollouts:Rollouts._earlier",
        lambda right: lambda self, group: (),
        (ATTEMPTS,),
    ),
    Replacement(
        "a curriculum trains on held-out problems",
        "drpo.tasks.unseen:_unseen",
        lambda right: lambda task, held_out: lambda problem: True,
        (f"{HERE}test_a_held_out_problem_is_not_in_the_pool_and_ids_are_those_of_every_run",),
    ),
)
