"""Mistakes where a run goes on with other settings."""

from typing import Any

from planted import Replacement

HERE = "tests/test_chapters.py::"


def _forgets_what_was_undone(right: Any) -> Any:
    def going_on(chapters: Any, config: Any, now: Any, step: int) -> Any:
        standing, _ = right(chapters, config, now, step)
        return standing, {name: (config.get(name), value) for name, value in now.items() if config.get(name) != value}

    return going_on


def _reads_the_present(right: Any) -> Any:
    return lambda chapters, name, step, now: now


def _keeps_the_summary(right: Any) -> Any:
    return lambda folder: False


def _one_more(right: Any) -> Any:
    def learning_rate(run: Any, step: int, update: int) -> Any:
        from drpo.train.config import configure

        return right(configure(run, steps=run.trainer.steps + 1), step, update)

    return learning_rate


REPLACEMENTS = (
    Replacement(
        "a run killed in a chapter forgets what the chapter changed",
        "drpo.train.continued:going_on",
        _forgets_what_was_undone,
        (f"{HERE}test_changes_without_a_step_of_their_own_are_one_chapter",),
    ),
    Replacement(
        "rollouts in flight are trained on, though sampling has changed",
        "drpo.train.session:samples_anew",
        lambda right: lambda chapters, step: False,
        (f"{HERE}test_rollouts_in_flight_are_sampled_again_where_sampling_changes",),
    ),
    Replacement(
        "a run that is lengthened keeps the summary of its earlier end",
        "drpo.train.run_session:is_finished",
        _keeps_the_summary,
        (f"{HERE}test_killed_while_it_is_lengthened_it_goes_on_in_the_same_chapter",),
    ),
    Replacement(
        "earlier steps are asked of the present objective",
        "drpo.report.token_statistics:value_at",
        _reads_the_present,
        (f"{HERE}test_the_objective_changes_and_each_step_is_asked_of_its_own",),
    ),
    Replacement(
        "a schedule counts one step more than there is",
        "drpo.train.loop:learning_rate",
        _one_more,
        (f"{HERE}test_a_schedule_counts_steps_without_a_gradient",),
    ),
)
