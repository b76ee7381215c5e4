"""Mistakes in the exact problems of the lab, and in the replay of a recorded batch."""

from planted import Bug

EXACT = "tests/test_lab_exact.py::"
REPLAY = "tests/test_replay.py::"
MOMENTS = f"{EXACT}test_mean_and_covariance_are_the_sums_over_all_draws"
UNBIASED = f"{EXACT}test_the_plain_surrogate_is_unbiased_anywhere_and_the_true_gradient_is_the_values"
DISTANCES = f"{EXACT}test_distances_are_their_definitions"
READING = f"{REPLAY}test_a_reading_is_its_definition"
BATCH = f"{REPLAY}test_the_batch_is_what_was_recorded_less_what_was_not_trained"
DISPUTES = f"{REPLAY}test_cosines_and_disputes"

BUGS = (
    Bug(
        8,
        "the softmax's own derivative is forgotten in the expected gradient",
        "lab/bandit.py",
        "    mean = h - pi * h.sum(-1, keepdim=True)\n",
        "    mean = h\n",
        (MOMENTS, UNBIASED),
    ),
    Bug(
        19,
        "the square of the mean is left in the variance",
        "lab/bandit.py",
        "return Estimate(mean, second - mean.square())",
        "return Estimate(mean, second)",
        (MOMENTS,),
    ),
    Bug(
        19,
        "contexts are correlated with nothing",
        "lab/bandit.py",
        "return second - mean[:, None] * mean",
        "return second - mean * mean",
        (MOMENTS,),
    ),
    Bug(
        12,
        "all contexts share one baseline",
        "lab/bandit.py",
        "    mean = (mu * (chance * reward).sum(0)).sum(-1)\n",
        "    mean = (context[:, None] * mu * (chance * reward).sum(0)).sum().expand(c) - 1\n",
        (f"{EXACT}test_the_tails_are_what_they_are_said_to_be",),
    ),
    Bug(
        8,
        "KL and reverse KL change places",
        "lab/bandit.py",
        "kl=mean(-mu * log_ratio)",
        "kl=mean(pi * log_ratio)",
        (DISTANCES,),
    ),
    Bug(
        8,
        "chi-square is divided by pi",
        "lab/bandit.py",
        "chi_square=mean(moved.square() / mu)",
        "chi_square=mean(moved.square() / pi)",
        (DISTANCES, f"{EXACT}test_penalties_are_the_divergences"),
    ),
    Bug(
        7,
        "the sampled estimate looks at other draws' log-probabilities",
        "lab/agreement.py",
        "    word = drawn % pi.numel()\n",
        "    word = drawn.roll(1) % pi.numel()\n",
        (f"{EXACT}test_a_million_draws_agree_within_their_error[drpo(0.2)]",),
    ),
    Bug(
        8,
        "a token is moved up its loss",
        "lab/claims.py",
        "push = -gradient(objective, lone(torch.sigmoid(x), mu, advantage)).sign()",
        "push = gradient(objective, lone(torch.sigmoid(x), mu, advantage)).sign()",
        (f"{EXACT}test_the_fixed_point_of_a_token_is_its_formula_from_both_sides",),
    ),
    Bug(
        13,
        "every rollout has the same coins",
        "lab/long_tail.py",
        "batch = frozen(resampled(problem, logits), generator)",
        "batch = frozen(resampled(problem, logits), torch.Generator().manual_seed(0))",
        (f"{EXACT}test_the_same_seed_has_the_same_coins",),
    ),
    Bug(
        7,
        "the sampler stays what it was through all rollouts",
        "lab/long_tail.py",
        "batch = frozen(resampled(problem, logits), generator)",
        "batch = frozen(problem, generator)",
        (f"{EXACT}test_who_learns_the_noisy_tail_and_who_the_rare_word",),
    ),
    Bug(
        19,
        "outcomes are drawn the other way round",
        "lab/long_tail.py",
        "outcome = (drawn >= problem.chance.cumsum(0)).sum(0)",
        "outcome = (drawn < problem.chance.cumsum(0)).sum(0)",
        (f"{EXACT}test_frozen_outcomes_come_as_often_as_their_chance",),
    ),
    Bug(
        7,
        "mu and pi change places in a replay",
        "lab/replay.py",
        '            column("logp"),\n            column("behavior_logp"),\n',
        '            column("behavior_logp"),\n            column("logp"),\n',
        (BATCH,),
    ),
    Bug(
        12,
        "steps are replayed together",
        "lab/replay.py",
        'chosen = [r for r in trained if r["step"] == (steps[-1] if step is None else step)]',
        "chosen = trained",
        (BATCH,),
    ),
    Bug(
        19,
        "a token of zero advantage counts as silenced",
        "lab/replay.py",
        "silenced=share((w == 0) & (a != 0)),",
        "silenced=share(slope == 0),",
        (READING,),
    ),
    Bug(
        19,
        "mass is counted without the ratio",
        "lab/replay.py",
        "(tokens.advantage * r).abs(), tokens.advantage",
        "tokens.advantage.abs(), tokens.advantage",
        (READING,),
    ),
    Bug(
        19,
        "the least disputed tokens are shown",
        "lab/replay.py",
        "apart.argsort(descending=True, stable=True)",
        "apart.argsort(stable=True)",
        (DISPUTES,),
    ),
    Bug(
        9,
        "an objective is given another divergence than it reads",
        "lab/replay.py",
        "if needed not in (None, batch.divergence):",
        "if needed is not None and batch.divergence is None:",
        (f"{REPLAY}test_a_divergence_is_read_where_it_was_recorded_and_refused_elsewhere",),
    ),
)
