"""Bugs of comparisons: what they vary, what survives, what is claimed."""

from planted import Bug

LAB = "tests/test_lab.py::"
RECORDS = "tests/test_train.py::test_rollouts_say_what_each_update_saw"

BUGS = (
    Bug(
        19,
        "a difference is claimed where intervals overlap",
        "lab/analysis.py",
        "a.regime == b.regime and disjoint(a.mean, b.mean)",
        "a.regime == b.regime and a.mean.value != b.mean.value",
        (f"{LAB}test_nothing_is_claimed_where_intervals_overlap", f"{LAB}test_one_seed_claims_nothing"),
    ),
    Bug(
        19,
        "regimes are compared with each other",
        "lab/analysis.py",
        "a.regime == b.regime and disjoint",
        "disjoint",
        (f"{LAB}test_a_regime_is_never_compared_with_another",),
    ),
    Bug(
        19,
        "the worst learning rate of an objective is shown",
        "lab/analysis.py",
        "c.mean.value > chosen[key].mean.value",
        "c.mean.value < chosen[key].mean.value",
        (f"{LAB}test_each_objective_is_taken_at_its_best_learning_rate",),
    ),
    Bug(
        9,
        "a run that diverged keeps its last accuracy",
        "lab/outcome.py",
        "return (*self.evaluations, (self.steps, 0.0)) if self.status == DIVERGED else self.evaluations",
        "return self.evaluations",
        (f"{LAB}test_what_breaks_is_a_result_and_what_fails_does_not_end_the_others",),
    ),
    Bug(
        20,
        "a run that breaks in its first step counts as one that diverged",
        "lab/worker.py",
        "(DIVERGED if steps else FAILED)",
        "DIVERGED",
        (f"{LAB}test_what_breaks_is_a_result_and_what_fails_does_not_end_the_others",),
    ),
    Bug(
        13,
        "cells are named by objective and seed alone",
        "lab/grid.py",
        'return f"{objective}-{run.seed}-{digest}"',
        'return f"{objective}-{run.seed}"',
        (f"{LAB}test_every_combination_is_a_cell_with_a_name_of_its_own",),
    ),
    Bug(
        13,
        "all cells have the recipe's seed",
        "lab/grid.py",
        "objective=arm.objective, seed=seed), rate)",
        "objective=arm.objective), rate)",
        (f"{LAB}test_every_combination_is_a_cell_with_a_name_of_its_own",),
    ),
    Bug(
        19,
        "the last quarter of training is its last half",
        "lab/analysis.py",
        "len(rewards) // 4",
        "len(rewards) // 2",
        (f"{LAB}test_without_evaluations_the_last_quarter_of_training_counts",),
    ),
    Bug(
        12,
        "a record's log-probabilities are in the order of the micro-batches",
        "train/log.py",
        "parts = column[order].split(counts.tolist())",
        "parts = column.split(counts.tolist())",
        (RECORDS,),
    ),
    Bug(
        20,
        "a run resumed before its first checkpoint is evaluated once more",
        "train/session.py",
        'if due and all(record["step"] != step for record in read_records(self.folder / EVALUATIONS)):',
        "if due:",
        ("tests/test_train.py::test_a_run_that_dies_in_its_first_step_is_evaluated_once",),
    ),
)
