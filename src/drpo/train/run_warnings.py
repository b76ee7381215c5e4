"""The warnings that a run can raise: what each means, its threshold and the reason for it, and what to do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from drpo.train import warning_rules as rules
from drpo.train.no_gradient import FIRST_WARNING
from drpo.train.warning_rules import WINDOW, Past

PAGE = "docs/warnings.md"
"""Where each has a section of its name."""


@dataclass(frozen=True)
class Rule:
    """A fault of training that shows in its metrics.

    Args:
        name: in summary.json, for trackers, and for `drpo explain`.
        reads: names of the metrics that it looks at.
        means: what has happened, in a sentence.
        threshold: when it is raised.
        reason: why there.
        advice: what to do.
        holds: whether it holds at present.
        says: what is seen, where it holds, in a line.
        remedies: whether `says` itself names remedies, by what is seen.
    """

    name: str
    reads: tuple[str, ...]
    means: str
    threshold: str
    reason: str
    advice: str
    holds: Callable[[Past], bool]
    says: Callable[[Past], str]
    remedies: bool = False

    def line(self, past: Past) -> str:
        """Return what is seen, and what to do, in a line."""
        advice = "" if self.remedies else f"; {self.advice}"
        return f"{self.says(past)}{advice} (drpo explain {self.name})"


_SIGNAL = (
    *("groups_with_signal", "frac_reward_zero_std", "groups_all_wrong", "groups_all_correct", "grad_norm"),
    *("skipped_updates", "value_mean", "truncated", "no_number", "masked", "reward_failed", "reward_abstained"),
)
_SMOLLM2 = (
    "Of 63 committed runs of SmolLM2-135M (`studies/results`), the 18 with a sampler as fine as the trainer, which all "
    "learn,"
)
_W = f"the last {WINDOW} steps"

RULES: tuple[Rule, ...] = (
    Rule(
        name="no_signal",
        reads=_SIGNAL,
        means=(
            "Every advantage is 0, since the rewards of each group are all equal, though neither all wrong nor all "
            "correct, or nothing is left to train on: no update learns from rewards."
        ),
        threshold=f"{FIRST_WARNING} steps in a row without a gradient, or in which every advantage by rewards is 0",
        reason=(
            "One such step is chance where groups are few; a sound task, of which a quarter of the groups carry a "
            f"signal, has {FIRST_WARNING} in a row of 8 groups in 1 of 1,000 cases."
        ),
        advice=(
            "look at the rewards of a group with `drpo report`: a reward with more values, a higher "
            "--sampling.temperature, more --sampling.samples; where the reward fails or abstains, mend it"
        ),
        holds=rules.no_other_cause,
        says=rules.says_starved,
        remedies=True,
    ),
    Rule(
        name="nothing_correct",
        reads=_SIGNAL,
        means="In nearly every group all completions are wrong, so that there is nothing to prefer.",
        threshold=(
            f"{rules.STARVED:.0%} of the groups of {_W} are all wrong, or half of them in {FIRST_WARNING} steps "
            "without any signal"
        ),
        reason="The doctor's bound before training, a tenth of the groups with a signal, asked again of five steps.",
        advice=(
            "check the reward with `drpo doctor`; else a warm start (docs/sft.md), which makes right answers possible: "
            "a new run with --warm-up 'best_of(8)' where the model is sometimes right, `drpo sft` on given answers "
            "where it never is; or an easier --task, more --sampling.samples, more --sampling.max-new-tokens where "
            "completions are cut"
        ),
        holds=lambda past: rules.starved(past, "groups_all_wrong"),
        says=rules.says_starved,
        remedies=True,
    ),
    Rule(
        name="everything_correct",
        reads=_SIGNAL,
        means=(
            "In nearly every group all completions are correct: there is nothing left to learn, or the reward pays "
            "for anything."
        ),
        threshold=(
            f"{rules.STARVED:.0%} of the groups of {_W} are all correct, or half of them in {FIRST_WARNING} steps "
            "without any signal"
        ),
        reason="As for nothing_correct. Also a run that has learnt its task ends here, and could have stopped.",
        advice=(
            "stop, or train on a harder --task; where the held-out reward says otherwise, `drpo doctor` tries the "
            "reward on wrong answers"
        ),
        holds=lambda past: rules.starved(past, "groups_all_correct"),
        says=rules.says_starved,
        remedies=True,
    ),
    Rule(
        name="failing_rewards",
        reads=("reward_failed", "sampled_tokens", "length_terminated", "length_truncated", "truncated"),
        means="The reward raises, hangs, dies or returns no number on many completions, which then teach nothing.",
        threshold=f"{rules.FAILED:.0%} of the completions of {_W}",
        reason=(
            "A verifier may time out now and then; a tenth is a fault of the reward, and biased: it fails on certain "
            "texts."
        ),
        advice=(
            "the `failure` of these completions in rollouts.jsonl says why; more --reward-pool.seconds where they "
            "time out"
        ),
        holds=lambda past: rules.failed(past) >= rules.FAILED,
        says=rules.says_failed,
    ),
    Rule(
        name="failing_endpoint",
        reads=("endpoint_calls", "endpoint_failed"),
        means="The judge or the service that scores has no score for many completions, which then teach nothing.",
        threshold=(
            f"{rules.ENDPOINT_FAILED:.0%} of the calls of {_W}, of at least {rules.ENDPOINT_LEAST}; retries are not "
            "counted, only what they did not mend"
        ),
        reason=(
            "A judge at temperature 0 follows its form nearly always, and a passing fault of the service is mended by "
            "retries: one in twenty is neither."
        ),
        advice=(
            "the `failure` of these completions in rollouts.jsonl says why: more `seconds` or a smaller `concurrency` "
            "of the reward where it is late or refuses, more `max_tokens` where judgements are cut"
        ),
        holds=lambda past: rules.endpoint_failed(past) >= rules.ENDPOINT_FAILED,
        says=rules.says_endpoint,
    ),
    Rule(
        name="truncation",
        reads=("truncated",),
        means="Most completions are cut at max_new_tokens, so that no answer is scored, and they do not become fewer.",
        threshold=f"{rules.CUT:.0%} of the completions of {_W}, and no fewer than in the {WINDOW} steps before",
        reason=(
            f"{_SMOLLM2} begin with 47 to 83 % cut over five steps, and end with 0 to 23 %: what is not falling by "
            "then does not fall."
        ),
        advice="more --sampling.max-new-tokens, or ask for short answers in the prompt",
        holds=rules.cut,
        says=rules.says_cut,
    ),
    Rule(
        name="entropy_collapse",
        reads=("entropy", "reward_mean", "reward_std"),
        means="The policy samples much the same again and again, and what it says earns little.",
        threshold=(
            f"the entropy of {_W} is {rules.ENTROPY_LOST:.0%} or less of the first {WINDOW}, and less than half of the "
            "reward's best gain is left (or it never gained)"
        ),
        reason=(
            f"Low entropy alone is no fault. {_SMOLLM2} go down to 6 to 21 % of their entropy and keep 66 % or more of "
            "their gain."
        ),
        advice=(
            "a smaller learning rate, fewer --updates, a small --entropy-bonus, or start again from an earlier "
            "checkpoint"
        ),
        holds=rules.entropy_lost,
        says=rules.says_entropy,
    ),
    Rule(
        name="entropy_explosion",
        reads=("entropy", "reward_mean", "reward_std"),
        means="The policy becomes random, and its reward does not rise.",
        threshold=(
            f"the entropy of {_W} is {rules.ENTROPY_GROWN:g} times that of the first {WINDOW}, and less than half of "
            "the reward's best gain is left (or it never gained)"
        ),
        reason="In 63 runs of SmolLM2-135M no single step is above 1.47 times the first five.",
        advice="a smaller learning rate, a smaller --entropy-bonus, an objective with a region",
        holds=rules.entropy_grown,
        says=rules.says_entropy,
    ),
    Rule(
        name="sampler_mismatch",
        reads=("ratio_mean", "k3"),
        means=(
            "At the very first update policy and sampler have the same weights and yet differ: the log-probabilities "
            "are not of the same distribution."
        ),
        threshold=(
            f"in the first update of step 1 the mean of pi/mu is off 1 by more than {rules.RATIO_OFF:g}, or k3 above "
            f"{rules.K3_OFF:g}"
        ),
        reason=(
            "A bf16 sampler has k3 of 0.001, an fp8 one 0.04, and a mean of 1.00 (docs/precision.md); a top-p of 0.8 "
            "that is left out has a mean of 0.9, stale weights a k3 of 0.36. k3's bound is that of the doctor's line "
            "`ratio`."
        ),
        advice="`drpo doctor` with the run's options: its lines ratio, temperature, support and sync say which it is",
        holds=rules.mismatch,
        says=rules.says_mismatch,
    ),
    Rule(
        name="rising_out_of_region",
        reads=("out_of_region",),
        means="More and more tokens leave the objective's region: updates go further than it is meant to allow.",
        threshold=(
            f"{rules.OUTSIDE:.0%} of the tokens of {_W}, and {rules.OUTSIDE_GROWN:g} times as many as in the first "
            f"{WINDOW}"
        ),
        reason=(
            f"{_SMOLLM2} never have more than 5.3 % outside over five steps. The doctor calls 10 % before training "
            "broken."
        ),
        advice="fewer --updates, a smaller learning rate, fewer --async-steps, a finer --rollout-precision",
        holds=rules.outside,
        says=rules.says_outside,
    ),
    Rule(
        name="gradient_spike",
        reads=("grad_norm",),
        means="A gradient is far larger than usual; clipping bounds the step, but few tokens make it.",
        threshold=(
            f"{rules.SPIKE:g} times the median of the {rules.SPIKE_HISTORY} steps before, of which {rules.SPIKE_LEAST} "
            "have a gradient"
        ),
        reason=f"{_SMOLLM2} stay below 3.4 times.",
        advice=(
            "look at that step's completions with `drpo report` (its largest |r w|); a smaller learning rate or "
            "--max-grad-norm where it comes again"
        ),
        holds=rules.spike,
        says=rules.says_spike,
    ),
    Rule(
        name="length_drift",
        reads=("length_terminated", "length_truncated", "truncated", "reward_mean", "reward_std"),
        means="Completions have become much longer or shorter, and the reward did not rise with it.",
        threshold=(
            f"the mean length of {_W} is {rules.LENGTH_FACTOR:g} times that of the first {WINDOW}, or half of it, with "
            "no higher training reward"
        ),
        reason=(
            "Reasoning that grows, or an answer without preamble, pays; what does not pay is a bias: of the "
            "reduction, of the reward, or of the limit of tokens."
        ),
        advice=(
            "a --reduction that does not depend on the length (horizon); look at completions for repetition with "
            "`drpo report`"
        ),
        holds=lambda past: rules.length_change(past) is not None,
        says=rules.says_length,
    ),
    Rule(
        name="reward_collapse",
        reads=("reward_mean", "reward_std"),
        means="The training reward has fallen far below its best.",
        threshold=(
            f"more than half of what it had gained is lost, means of {WINDOW} steps, and at least half a standard "
            "deviation of the rewards"
        ),
        reason=(
            f"{_SMOLLM2} keep 66 % or more of their best gain at the end. Half a standard deviation is beyond the "
            "noise of five steps of 8 prompts."
        ),
        advice="go back to the best checkpoint with a smaller learning rate or fewer --updates",
        holds=rules.reward_lost,
        says=rules.says_lost,
    ),
    Rule(
        name="reward_hacking",
        reads=("reward_mean",),
        means=(
            "The training reward rises while the held-out reward falls: the policy learns what the reward pays for, "
            "not the task, or it learns its problems by heart."
        ),
        threshold=(
            "an evaluation's 95 % interval lies below that of the best one before it (or the paired difference from "
            "step 0 below 0), and the training reward is higher than then"
        ),
        reason=(
            "Intervals that do not overlap are a difference at far less than 5 %. What a held-out reward of the same "
            "kind pays for as well cannot be seen here."
        ),
        advice=(
            "read completions with `drpo report`; try the reward on wrong answers with `drpo doctor`; more problems, "
            "an earlier checkpoint, a --reference-kl"
        ),
        holds=lambda past: rules.hacked(past) is not None,
        says=rules.says_hacked,
    ),
    Rule(
        name="repeated_skips",
        reads=("skipped_updates", "value_skipped"),
        means="Again and again an update is skipped, because its gradient is not finite.",
        threshold=f"{rules.SKIPPED} updates in the last {rules.SKIPPED_STEPS} steps",
        reason=(
            "A single one is said where it happens, and --max-skipped in a row end the run; several apart from each "
            "other do neither."
        ),
        advice=(
            "look at those steps with `drpo report`; a smaller learning rate, --precision fp32, an objective without "
            "exponentials"
        ),
        holds=lambda past: rules.n_skipped(past) >= rules.SKIPPED,
        says=rules.says_skipped,
    ),
    Rule(
        name="curriculum_exhausted",
        reads=("curriculum_filled", "curriculum_active", "curriculum_easy", "curriculum_hard"),
        means=(
            "The curriculum has fewer active problems than a rollout takes; the rest are easy or hard ones, those "
            "first that were not drawn for longest."
        ),
        threshold="one problem of a rollout that is there for this reason",
        reason="It is counted, not estimated. The run goes on; most of what is filled up teaches nothing.",
        advice=(
            "stop where nearly all are easy; else fewer --prompts, more problems, or a smaller pools(hard=...) in "
            "--curriculum"
        ),
        holds=rules.exhausted,
        says=rules.says_exhausted,
    ),
)
"""All warnings, in the order in which they are said."""

BY_NAME: Mapping[str, Rule] = {rule.name: rule for rule in RULES}

SIGNAL_RULES = frozenset(rule.name for rule in RULES if "groups_with_signal" in rule.reads)
"""Names of those that steps in a row without a signal raise, which are then of all these steps."""
