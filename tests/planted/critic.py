"""Mistakes of PPO with a critic: in its advantages, its loss, where its values are read, and what a run keeps of it."""

from collections.abc import Callable, Sequence
from typing import Any

from planted import Bug, Replacement

T = "tests/test_critic.py::"
DEFINITION = f"{T}test_advantages_are_what_the_definition_says"
ENDS = f"{T}test_the_ends_of_lambda_have_closed_forms"
ALONE = f"{T}test_completions_do_not_touch"
WHITENED = f"{T}test_whitened_advantages_have_mean_0_and_deviation_1"
LOSS = f"{T}test_the_value_loss_and_its_gradient"
GRADIENT = f"{T}test_its_gradient_is_that_of_the_plain_formula"
PLACES = f"{T}test_values_are_those_of_the_text_before_each_token"
CREDITED = f"{T}test_a_critic_credits_each_token_with_its_advantage"
FIGURES = f"{T}test_the_figures_of_a_step"
RESUMED = f"{T}test_cut_off_and_resumed_it_is_one_run_bit_for_bit"
RECORDED = f"{T}test_rollouts_record_what_each_token_was_worth"
TWO = "tests/test_ranks.py::test_more_processes_are_one_run[2-critic-none]"
DIVIDED = "tests/test_ranks.py::test_more_processes_are_one_run[3-critic-fsdp]"
REGROUPED = "tests/test_ranks.py::test_a_critic_stopped_on_two_processes_and_resumed_on_three_then_on_one"
SKIPPED = f"{T}test_a_broken_update_of_the_critic_is_skipped_and_counted"
ENDED = f"{T}test_a_critic_that_stays_broken_ends_the_run"
GAE, CRITIC = "credit/gae.py", "train/critic.py"


def _counts_the_policys(right: Callable[..., int]) -> Callable[..., int]:
    def wrong(session: Any, whose: str, skipped: int, updates: Sequence[Any]) -> int:
        return right(session, whose, skipped, updates if whose == "policy" else ())

    return wrong


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
        CRITIC,
        "self.critic.checkpointed(), self.optimizer, self.ranks, prefix=PREFIX)",
        "self.critic.checkpointed(), self.optimizer, prefix=PREFIX)",
        (REGROUPED,),
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
        "a resumed critic begins with new moments",
        CRITIC,
        "checkpoint.restore(folder, self.critic.checkpointed(), self.optimizer, prefix=PREFIX)",
        "checkpoint.restore(folder, self.critic.checkpointed(), None, prefix=PREFIX)",
        (RESUMED,),
    ),
)

REPLACEMENTS = (
    Replacement(
        "equal advantages are divided by a deviation of 0",
        "drpo.credit.gae:all_equal",
        lambda right: lambda values: values.numel() == 0,
        (WHITENED,),
    ),
    Replacement(
        "advantages of a critic are not whitened",
        "drpo.credit.rules:whitened",
        lambda right: lambda advantage: advantage,
        (f"{CREDITED}[True]", RECORDED),
    ),
    Replacement(
        "nobody counts the critic's skipped updates",
        "drpo.train.session:Session._count_skipped",
        _counts_the_policys,
        (SKIPPED, ENDED),
    ),
    Replacement(
        "a record says the mean of a completion's advantages alone",
        "drpo.train.log:_advantage_record",
        lambda right: lambda advantage: {"advantage": right(advantage)["advantage"]},
        (RECORDED,),
    ),
    Replacement(
        "a resumed run begins with a new critic",
        "drpo.train.critic:CriticTrainer.restore",
        lambda right: lambda self, folder: None,
        (RESUMED,),
    ),
    Replacement(
        "each process keeps its own gradient of the critic",
        "drpo.critic:Critic.reduce_gradients",
        lambda right: lambda self, ranks: right(self, type(ranks)()),
        (TWO,),
    ),
)
