"""Mistakes of PPO with a critic: in its advantages, its loss, where its values are read, and what a run keeps of it."""

from planted import Bug, Replacement

T = "tests/test_critic.py::"
DEFINITION = f"{T}test_advantages_are_what_the_definition_says"
ENDS = f"{T}test_the_ends_of_lambda_have_closed_forms"
ALONE = f"{T}test_completions_do_not_touch"
WHITENED = f"{T}test_whitened_advantages_have_mean_0_and_deviation_1"
LOSS = f"{T}test_the_value_loss_and_its_gradient"
GRADIENT = f"{T}test_its_gradient_is_that_of_the_plain_formula"
PLACES = f"{T}test_values_are_those_of_the_text_before_each_token"
APPRAISED = f"{T}test_appraisal_gives_each_token_its_advantage"
FIGURES = f"{T}test_the_figures_of_a_step"
RESUMED = f"{T}test_cut_off_and_resumed_it_is_one_run_bit_for_bit"
RECORDED = f"{T}test_rollouts_record_what_each_token_was_worth"
TWO = "tests/test_ranks.py::test_more_processes_are_one_run[2-critic-none]"
DIVIDED = "tests/test_ranks.py::test_more_processes_are_one_run[3-critic-fsdp]"
REGROUPED = "tests/test_ranks.py::test_a_critic_stopped_on_two_processes_and_resumed_on_three_then_on_one"
SKIPPED = f"{T}test_a_broken_update_of_the_critic_is_skipped_and_counted"
ENDED = f"{T}test_a_critic_that_stays_broken_ends_the_run"
GAE, VALUE = "gae.py", "train/value.py"

BUGS = (
    Bug(
        17,
        "a completion's last token looks to the value of the next completion",
        GAE,
        "torch.where(sequence[1:] == sequence[:-1], value[1:].double(), 0)",
        "value[1:].double()",
        (ALONE, DEFINITION),
    ),
    Bug(
        17,
        "a completion's errors count in the one before",
        GAE,
        "torch.where(sequence[summed:] == sequence[:-summed], advantage[summed:], 0)",
        "advantage[summed:].clone()",
        (ALONE, DEFINITION),
    ),
    Bug(
        7,
        "the sum of errors stops before the end of long completions",
        GAE,
        "while summed < longest:",
        "while 2 * summed < longest:",
        (DEFINITION,),
    ),
    Bug(8, "the next value is not discounted", GAE, "gamma * following", "following", (ENDS,)),
    Bug(8, "errors are not discounted", GAE, "(gamma * lam) ** summed", "lam**summed", (DEFINITION, ENDS)),
    Bug(
        8,
        "the smaller of the two value losses counts",
        GAE,
        "torch.maximum(loss, (near - returns).square())",
        "torch.minimum(loss, (near - returns).square())",
        (LOSS, GRADIENT),
    ),
    Bug(
        7,
        "values are clipped around what they are now",
        "critic.py",
        "value_loss(value, micro.value, micro.returns, clip)",
        "value_loss(value, value.detach(), micro.returns, clip)",
        (GRADIENT,),
    ),
    Bug(
        17,
        "a value is read where its own token stands",
        "packing.py",
        "    return hidden[micro.position].to(dtype)",
        "    return hidden[(micro.position + 1).clamp(max=len(hidden) - 1)].to(dtype)",
        (PLACES,),
    ),
    Bug(
        8,
        "the whole reward comes with every token",
        VALUE,
        "torch.where(last, micro.advantage, 0)",
        "micro.advantage",
        (APPRAISED,),
    ),
    Bug(
        2,
        "advantages are whitened in each micro-batch",
        VALUE,
        "(whitened(advantage) if self.how.whiten else advantage).split([len(v) for v in values])",
        "[whitened(a) if self.how.whiten else a for a, _ in found]",
        (f"{APPRAISED}[True]",),
    ),
    Bug(
        19,
        "what left the clip is counted over several updates and divided by the tokens of one",
        "train/metrics.py",
        "n = sum(lesson.n_tokens for lesson in taken)",
        "n = taken[-1].n_tokens",
        (FIGURES,),
    ),
    Bug(
        2,
        "each process keeps its own gradient",
        VALUE,
        "self.critic.reduce_gradients(self.ranks)",
        "self.critic.reduce_gradients(ALONE)",
        (TWO,),
    ),
    Bug(
        12,
        "values of other processes are taken in the order in which they come",
        VALUE,
        "sorted(found, key=lambda pair: pair[0])",
        "found",
        (TWO,),
    ),
    Bug(
        2,
        "a divided critic's embedding stays whole behind a pass without gradients",
        "sharding.py",
        "outermost.set_reshard_after_forward(True, recurse=False)",
        "outermost.set_reshard_after_forward(False, recurse=False)",
        (DIVIDED,),
    ),
    Bug(
        20,
        "a divided critic keeps whole the head that it does not use",
        "critic.py",
        "        model.set_output_embeddings(None)\n",
        "",
        (REGROUPED,),
    ),
    Bug(
        20,
        "the parts of a divided critic are written over one another",
        VALUE,
        "self.critic.checkpointed(), self.optimizer, self.ranks, prefix=PREFIX)",
        "self.critic.checkpointed(), self.optimizer, prefix=PREFIX)",
        (REGROUPED,),
    ),
    Bug(
        19,
        "nobody counts the critic's skipped updates",
        "train/session.py",
        'self._count_skipped("critic", self._done.critic_skipped, lessons)',
        "0",
        (SKIPPED, ENDED),
    ),
    Bug(
        19,
        "the weights behind a skipped update of the critic are not kept",
        "train/session.py",
        " and all(s.taken for s in lessons))",
        ")",
        (SKIPPED,),
    ),
    Bug(
        19,
        "figures of skipped updates of the critic are recorded",
        "train/metrics.py",
        "taken = [lesson for lesson in lessons if lesson.taken]",
        "taken = list(lessons)",
        (SKIPPED,),
    ),
    Bug(
        11,
        "a prompt's only completion is dropped though a critic values it",
        "batch.py",
        "least = 1 if how.advantage is None else 2",
        "least = 2",
        (f"{T}test_groups_of_one_train_where_a_critic_gives_advantages",),
    ),
    Bug(
        11,
        "completions of reward 0 are skipped as if they had no gradient",
        "train/setup.py",
        "terms is None and run.critic is None and",
        "terms is None and",
        (RECORDED,),
    ),
    Bug(
        7,
        "the policy trains a step before the critic is warm",
        "train/config.py",
        "step < run.critic.warmup",
        "step < run.critic.warmup - 1",
        (f"{T}test_while_the_critic_warms_up_the_policy_stays_as_it_is",),
    ),
    Bug(
        20,
        "a resumed run begins with a new critic",
        "train/session.py",
        "                self.parts.learner.restore(last)",
        "                pass",
        (RESUMED,),
    ),
    Bug(
        20,
        "a resumed critic begins with new moments",
        VALUE,
        "checkpoint.restore(folder, self.critic.checkpointed(), self.optimizer, prefix=PREFIX)",
        "checkpoint.restore(folder, self.critic.checkpointed(), None, prefix=PREFIX)",
        (RESUMED,),
    ),
    Bug(
        19,
        "a record says the mean of a completion's advantages alone",
        "train/log.py",
        "if (part != batch.advantages[n]).any():",
        "if False:",
        (RECORDED,),
    ),
)

REPLACEMENTS = (
    Replacement(
        "equal advantages are divided by a deviation of 0",
        "drpo.gae:all_equal",
        lambda right: lambda values: values.numel() == 0,
        (WHITENED,),
    ),
)
