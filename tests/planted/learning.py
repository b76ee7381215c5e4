"""Runs that train on nothing and are called a success; intervals that promise too little or too much."""

from planted import Replacement

LEARNING, METRICS, WARNINGS = "tests/test_learning.py::", "tests/test_metrics.py::", "tests/test_warnings.py::"

REPLACEMENTS = (
    Replacement(
        "steps without a gradient are not noticed",
        "drpo.train.no_gradient:without_gradient",
        lambda right: lambda record: False,
        (f"{LEARNING}test_a_run_of_equal_rewards_says_that_nothing_was_learnt",),
    ),
    Replacement(
        "a gradient of additive terms alone is taken for learning",
        "drpo.train.no_gradient:_without_signal",
        lambda right: lambda metrics: [m for m in metrics if m.get("grad_norm", 0.0) == 0],
        (f"{LEARNING}test_a_gradient_that_no_reward_made_is_no_learning",),
    ),
    Replacement(
        "equal rewards are taken for no signal, whatever the advantage",
        "drpo.train.no_gradient:without_signal",
        lambda right: lambda record: right({k: v for k, v in record.items() if k != "groups_with_signal"}),
        (f"{LEARNING}test_an_advantage_that_compares_no_group_learns_from_equal_rewards",),
    ),
    Replacement(
        "the KL in the reward is taken for a signal",
        "drpo.train.setup:without_reference_kl",
        lambda right: lambda groups: groups,
        (f"{LEARNING}test_a_gradient_that_no_reward_made_is_no_learning[term2]",),
    ),
    Replacement(
        "the doctor takes equal rewards for no signal, whatever the advantage",
        "drpo.doctor.signal:carrying",
        lambda right: lambda groups, credit: sum(not group.equal_rewards for group in groups),
        (f"{LEARNING}test_the_doctor_counts_the_groups_that_the_run_would_train_on",),
    ),
    Replacement(
        "the doctor compares a critic's completions within each prompt",
        "drpo.doctor.signal:_all_alike",
        lambda right: lambda groups: all(group.equal_rewards for group in groups),
        (f"{LEARNING}test_the_doctor_compares_the_completions_of_all_prompts_where_there_is_a_critic",),
    ),
    Replacement(
        "rewards of turns are taken for none",
        "drpo.types.rollout:ScoredGroup.equal_rewards",
        lambda right: lambda group: len({result.total for result in group.results}) <= 1,
        (f"{LEARNING}test_rewards_of_turns_are_a_signal_where_every_total_is_the_same",),
    ),
    Replacement(
        "a hopeless task is sound to the doctor",
        "drpo.doctor.signal:too_few",
        lambda right: lambda n, groups: False,
        (f"{LEARNING}test_the_doctor_looks_further_where_few_groups_carry_a_signal_and_warns_of_a_hopeless_task",),
    ),
    Replacement(
        "the canary's prompts are longer than the model reads",
        "drpo.doctor.sync:fitting",
        lambda right: lambda tokenizer, limits, sampling: lambda problem: True,
        ("tests/test_doctor.py::test_a_model_of_few_positions_can_be_looked_at",),
    ),
    Replacement(
        "a difference of evaluations is as sure as the one of more samples",
        "drpo.train.evaluate:summed_up",
        lambda right: lambda groups, n_samples, *, n_before=None, **others: right(groups, n_samples, **others),
        (f"{LEARNING}test_of_two_evaluations_the_one_of_fewer_samples_says_how_sure_their_difference_is",),
    ),
    Replacement(
        "groups of equal rewards are dropped though the advantage learns from them",
        "drpo.train.config.run:Run._require_comparison",
        lambda right: lambda run: None,
        ("tests/test_dynamic_sampling.py::test_what_cannot_be_is_refused_in_a_line",),
    ),
    Replacement(
        "a clip at 0 or NaN is accepted",
        "drpo.train.config.checks:require",
        lambda right: lambda fine, name, *rest: right(fine or name == "max_grad_norm", name, *rest),
        (f"{LEARNING}test_a_clip_that_leaves_no_gradient_is_refused",),
    ),
    Replacement(
        "the interval ignores that more samples of a problem say more",
        "drpo.train.evaluate:mean_interval",
        lambda right: lambda means, most, level=0.95: right(means, means.shape[-1], level),
        (f"{METRICS}test_the_interval_of_several_samples_a_problem_holds_the_mean_in_95_of_100_cases",),
    ),
    Replacement(
        "the interval takes all samples as independent",
        "drpo.train.evaluate:_score_interval",
        lambda right: lambda mean, n, quantile: right(mean, 4 * n, quantile),
        (f"{METRICS}test_the_interval_of_several_samples_a_problem_holds_the_mean_in_95_of_100_cases",),
    ),
    Replacement(
        "a change in no problem is certain",
        "drpo.train.evaluate:difference_interval",
        lambda right: lambda differences, n_samples, level=0.95: right(differences, None, level),
        (f"{METRICS}test_no_change_in_a_few_problems_is_not_certain_and_one_without_bounds_has_no_interval",),
    ),
    Replacement(
        "the KL in the loss is said to be that of texts",
        "drpo.objectives.terms:reference_kl",
        lambda right: lambda logp, reference, behavior, estimator="k2": 2 * right(logp, reference, behavior, estimator),
        ("tests/test_terms.py::test_the_kl_is_of_tokens_in_their_contexts_and_not_of_texts",),
    ),
    Replacement(
        "low entropy alone is called a collapse",
        "drpo.train.warning_rules:Gain.unpaid",
        lambda right: lambda gain: True,
        (f"{WARNINGS}test_sound_runs_raise_none",),
    ),
    Replacement(
        "a warning is said at every step",
        "drpo.train.warned:_is_due",
        lambda right: lambda warning: True,
        (f"{WARNINGS}test_one_is_said_when_it_begins_and_when_it_has_lasted_twice_as_long",),
    ),
    Replacement(
        "a whole step is taken for its first update",
        "drpo.train.warned:kept",
        lambda right: lambda record: {name: value for name, value in right(record).items() if name != "updates"},
        (f"{WARNINGS}test_a_planted_failure_is_named_and_nothing_else",),
    ),
)
