"""What each metric of a step means, what is normal, and what to do: docs/metrics.md and `drpo explain` say the same."""

import inspect
import re
from collections.abc import Mapping
from typing import NamedTuple

from drpo.train.records import Evaluation


class Meaning(NamedTuple):
    """What is to be known of a metric.

    Args:
        text: what it is, and how it is computed.
        normal: what is to be expected of it.
        advice: what to do where it is otherwise; empty where a warning that reads it says so.
    """

    text: str
    normal: str
    advice: str = ""


REWARD_PARTS = "reward_parts/"
"""Prefix of the metric of a part of the reward."""

ROLLOUT_METRICS: Mapping[str, Meaning] = {
    "reward_mean": Meaning(
        "mean reward over scored completions",
        "rises, with noise: problems differ from step to step; judge by the held-out reward",
        "look at completions and their scores with `drpo report`",
    ),
    "reward_std": Meaning(
        "standard deviation (population) of the rewards over scored completions",
        "above 0; for rewards of 0 and 1 at most 0.5, and near 0 where nearly all are wrong or right",
    ),
    "groups_all_correct": Meaning(
        "share of groups whose every reward is at least 1",
        "rises as the task is learnt; above a half most of the sampling is spent on nothing",
    ),
    "groups_all_wrong": Meaning(
        "share of groups whose every reward is at most 0",
        "falls as the task is learnt",
    ),
    "frac_reward_zero_std": Meaning(
        "share of groups whose rewards are all equal (to a millionth of the largest), those of their turns too; an "
        "advantage that compares a group's samples is 0 there; TRL's name for it",
        "0.1 to 0.7; more where a task is nearly solved or too hard",
    ),
    "no_number": Meaning(
        "share of completions without a digit, of problems whose answer has one; absent where none has",
        "near 0 after the first steps",
        "say in the prompt how to answer, or leave more room: --sampling.max-new-tokens",
    ),
    "length_terminated": Meaning(
        "mean tokens of completions that ended with an EOS; absent where none did",
        "changes where that pays: rewards should rise with it",
    ),
    "length_truncated": Meaning(
        "mean tokens of completions cut at max_new_tokens; absent where none was",
        "equal to max_new_tokens; in environments up to the turns' sum",
    ),
    "truncated": Meaning("share of completions cut at max_new_tokens", "falls below a tenth in the first steps"),
    "sampled_tokens": Meaning(
        "tokens sampled", "prompts times samples times the mean length; what rollouts cost grows with it"
    ),
    "staleness": Meaning(
        "mean age of the weights that sampled the completions: steps trained since",
        "0; up to --async-steps and --sync-every",
        "fewer --async-steps, a smaller --sync-every",
    ),
    "staleness_max": Meaning(
        "staleness of the oldest completion",
        "0; up to --async-steps and --sync-every",
        "fewer --async-steps, a smaller --sync-every",
    ),
    "reward_failed": Meaning(
        "completions whose reward failed; left out, or scored 0 where reward_pool.on_failure is zero", "0"
    ),
    "reward_raised": Meaning("of these, the reward raised an exception", "0"),
    "reward_timed_out": Meaning("of these, it ran past reward_pool.seconds", "0"),
    "reward_died": Meaning("of these, its process died", "0"),
    "reward_not_finite": Meaning("of these, it returned NaN, an infinity, or a number above 1e30 in size", "0"),
    "reward_not_a_number": Meaning("of these, it returned something else than a number or None", "0"),
    "reward_abstained": Meaning(
        "completions left out because their reward returned None",
        "0, unless the reward is meant to abstain",
        "look at these completions in rollouts.jsonl: their `reward` is null",
    ),
}

SIGNAL_METRICS: Mapping[str, Meaning] = {
    "groups_with_signal": Meaning(
        "share of groups with a trained token whose advantage is not 0, as the step trained it: with the run's "
        "advantage or critic, whitening and filters; what --kl-in-reward alone makes does not count",
        "0.3 to 0.9 where a group's samples are compared; near 1 with --whiten, --advantage reward or a critic",
    ),
}

ENDPOINT_METRICS: Mapping[str, Meaning] = {
    "endpoint_calls": Meaning(
        "scores that a judge or another service was asked for; these are there where the reward is one",
        "the completions, without those whose score is known",
    ),
    "endpoint_failed": Meaning(
        "of these, without a score: no answer after all retries, refused, or an answer without a valid score",
        "0; a few in a hundred of a small judge",
    ),
    "endpoint_retries": Meaning(
        "attempts after the first: there was no connection, no answer, or status 429 or from 500 on",
        "0",
        "a smaller `concurrency` where the service refuses for the number of requests, more `seconds` where it is slow",
    ),
    "endpoint_cached": Meaning(
        "scores that were known from an equal request and not asked for again",
        "rises as completions become alike",
    ),
    "endpoint_seconds": Meaning(
        "seconds of all calls together, retries included; calls run side by side, so a step takes less",
        "calls times the service's own time",
        "more `concurrency`, where seconds/reward is much of the step",
    ),
    "endpoint_prompt_tokens": Meaning(
        "tokens that the judge read, as it reports them; what it costs grows with them", "calls times the prompt"
    ),
    "endpoint_completion_tokens": Meaning(
        "tokens that the judge wrote, as it reports them", "calls times its answer, at most `max_tokens` each"
    ),
}

FILTER_METRICS: Mapping[str, Meaning] = {
    "overlong_masked": Meaning(
        "completions cut at the limit that --overlong mask left out of the loss",
        "as many as are cut, where the reward scores them",
    ),
    "overlong_punished": Meaning(
        "completions whose length --overlong shaped punished; reward_parts/overlong is the mean over all completions",
        "falls as completions become shorter than the limit",
    ),
    "resampled_groups": Meaning(
        "groups that --dynamic-sampling sampled again, all their rewards being equal (for gdpo those of each part)",
        "the share of such groups, times the prompts",
        "a task of another difficulty, where it is most of them",
    ),
    "resampling_attempts": Meaning(
        "how often it sampled one of them again, in all; each costs as much as a group",
        "once or twice the groups that were sampled again",
        "a smaller --dynamic-sampling, where the same groups are sampled in vain",
    ),
}

CURRICULUM_METRICS: Mapping[str, Meaning] = {
    "curriculum_active": Meaning(
        "share of the problems to train on that rollouts are drawn from: neither easy nor hard, or not yet measured; "
        "after the step, as the next two; the three add up to 1",
        "falls from 1 as problems are measured; rises where hard ones become possible",
    ),
    "curriculum_easy": Meaning(
        "share that has retired: the pass rate of its last groups is at least `easy`",
        "rises as the task is learnt; where it falls, something is being forgotten",
        "compare with the held-out reward",
    ),
    "curriculum_hard": Meaning(
        "share that waits: the pass rate of its last groups is at most `hard`",
        "rises as problems are measured, then falls as the policy becomes able",
        "a larger `revisit`, more --sampling.samples, where it stays and the reward rises",
    ),
    "curriculum_drawn": Meaning(
        "share of the problems that has been drawn at least once",
        "1 after the first epoch; far below 1 the pass rates choose little, since problems hardly come twice",
        "more --steps, or fewer problems",
    ),
    "curriculum_revisited": Meaning(
        "problems of the rollout that were easy or hard, and came back for a check",
        "`revisit` times the prompts, once there are some",
    ),
    "curriculum_filled": Meaning(
        "problems of the rollout that were easy or hard, drawn because too few are active", "0"
    ),
}

TURN_METRICS: Mapping[str, Meaning] = {
    "turns": Meaning(
        "mean turns of the model in an episode; these are there where episodes are in environments",
        "from 1 to --max-turns; as many as the task takes",
    ),
    "turns_max": Meaning(
        "most turns of an episode", "at most --max-turns", "more --max-turns where episodes end at that limit undone"
    ),
    "turn_tokens": Meaning("mean sampled tokens of a turn", "well below --sampling.max-new-tokens"),
    "episodes_done": Meaning(
        "share of episodes that their environment ended; a limit of turns or tokens ended the others",
        "rises towards 1",
        "more --max-turns, --max-episode-tokens or --sampling.max-new-tokens",
    ),
    "calls": Meaning(
        "mean calls of tools in an episode that could be read",
        "rises where tools pay; 0 for long means that the model never tries",
        "show the form of a call in the system message",
    ),
    "failed_calls": Meaning(
        "mean calls of tools in an episode that could not be read or that failed",
        "falls towards 0",
        "let the tool's reply say what was wrong with the call",
    ),
    "branches": Meaning(
        "mean sequences of an episode besides the first: times that its history had to be rendered anew",
        "0; more where the chat template drops or rewrites what was said before",
        "`drpo doctor` shows how often; a --chat-template that keeps the history",
    ),
    "environment_failed": Meaning(
        "episodes whose environment failed; counted among reward_failed too",
        "0",
        "their `failure` in rollouts.jsonl says why",
    ),
}

MOST_TURNS = 8
"""Turns that have figures of their own."""

BY_TURN_METRICS: Mapping[str, Meaning] = {
    f"{name}/turn_{turn}": Meaning(f"{meaning} over the tokens of turn {turn}", normal, advice)
    for name, meaning, normal, advice in (
        (
            "prob_diff_mean",
            "mean |pi - mu|",
            "much the same in each turn",
            "where it grows with the turn: the line `turns` of `drpo doctor`",
        ),
        ("ratio_mean", "mean of r", "1 within a few per cent, in each turn", "the line `turns` of `drpo doctor`"),
    )
    for turn in range(1, MOST_TURNS + 1)
}

PART_METRICS: Mapping[str, Meaning] = {
    f"{REWARD_PARTS}NAME": Meaning(
        "mean of the part NAME of the reward, over the episodes that have it: of a sum the reward of that name, before "
        "its weight; else of the reward's `RewardResult`",
        "shows which part rises: an easy part, such as one of format, that rises alone is no learning of the task",
    ),
}

TOKEN_METRICS: Mapping[str, Meaning] = {
    "entropy": Meaning(
        "mean entropy of the policy, nats",
        "falls as the reward rises, to a tenth or less of its start where a problem has one answer",
    ),
    "prob_diff_mean": Meaning(
        "mean |pi - mu|",
        "0.001 to 0.03; the sampler's precision alone makes 0.005 (bf16) to 0.03 (fp8)",
        "fewer --updates, a smaller learning rate, a finer --rollout-precision",
    ),
    "prob_diff_p99": Meaning(
        "99th percentile of |pi - mu|",
        "below the radius of the region; the sampler's precision alone makes 0.03 (bf16) to 0.2 (fp8)",
        "fewer --updates, a smaller learning rate, a finer --rollout-precision",
    ),
    "masked": Meaning(
        "share of tokens with gradient weight <= 0: masked, or pulled back",
        "below a tenth",
        "fewer --updates, a smaller learning rate, a wider region",
    ),
    "weight_min": Meaning(
        "smallest gradient weight w (1 is the plain policy gradient)", "0 or more for a mask; DRPO's goes below 0"
    ),
    "weight_mean": Meaning("mean gradient weight", "0.8 to 1"),
    "weight_max": Meaning("largest gradient weight", "1 for a mask or a clip; DRPO's and SPO's go above it"),
    "ratio_mean": Meaning("mean of r = pi / mu; 1 on-policy", "1 within 5 %, whatever the policy does"),
    "ratio_max": Meaning(
        "largest r",
        "2 to 20: a rare token that became likely",
        "where it is larger: that token, in `drpo report`; `drpo doctor` where it is there at step 1",
    ),
    "scaled_weight_max": Meaning(
        "largest |r w|: how much one token's gradient is scaled",
        "below 10",
        "an objective with a region; that token, in `drpo report`",
    ),
    "ratio_capped": Meaning(
        "tokens whose ratio was capped at e^20",
        "0",
        "the log-probabilities are not those of the same tokens: `drpo doctor`",
    ),
    "k3": Meaning(
        "estimate of KL(mu || pi), nats: mean of r - 1 - log r",
        "0.001 on-policy with bf16 rollouts, 0.04 with fp8; up to 0.1 after several updates",
    ),
    "trained_tokens": Meaning(
        "tokens whose log-probability was computed; completions with zero advantage are skipped",
        "sampled_tokens times the share of groups whose rewards differ",
    ),
}

REGION_METRICS: Mapping[str, Meaning] = {
    "out_of_region": Meaning(
        "share of tokens that have left the objective's region; the three are there where it has one",
        "below 5 %; of the step's first update near 0",
    ),
    "out_of_region_low": Meaning("share of tokens that have left it with pi below mu", "about half of out_of_region"),
    "out_of_region_high": Meaning("share of tokens that have left it with pi above mu", "about half of out_of_region"),
}

DIVERGENCE_METRICS: Mapping[str, Meaning] = {
    "divergence_mean": Meaning(
        "mean of the top-K divergence that the objective reads; present where it reads one", "well below its radius"
    ),
    "divergence_p99": Meaning(
        "99th percentile of it", "below its radius", "fewer --updates, a smaller learning rate, a wider region"
    ),
}

AUXILIARY_METRICS: Mapping[str, Meaning] = {
    "reference_kl": Meaning(
        "mean of r (log pi - log reference)^2 / 2, nats: the KL to the initial model (k2), before its coefficient; "
        "present with reference_kl",
        "grows from 0 and levels off",
        "a larger --reference-kl where it goes on growing",
    ),
}

ROUTING_METRICS: Mapping[str, Meaning] = {
    "routing_replaced": Meaning(
        "share of trained tokens for which the trainer would itself have chosen other experts, in at least one layer; "
        "the three are there with routing_replay",
        "a few per cent with bf16 rollouts, more with fp8, and more with each update",
    ),
    "routing_missing": Meaning(
        "positions of prompts and completions without a choice to replay, where the trainer's own holds",
        "0",
        "an engine that reports all choices: --engine transformers",
    ),
    "routing_conflicts": Meaning(
        "positions of shared prompts for which a sample's experts are not those replayed, which are an earlier "
        "sample's; counted for each such sample",
        "0 where the engine reads a prompt once for all of its samples",
    ),
}

UPDATE_METRICS: Mapping[str, Meaning] = {
    "loss": Meaning(
        "the batch's loss; near 0 is normal, since advantages sum to 0 in a group", "near 0; it says little"
    ),
    "grad_norm": Meaning(
        "L2 norm of the gradient before clipping", "of one order of magnitude throughout; --max-grad-norm clips it"
    ),
    "learning_rate": Meaning("of the update", "as --optimizer and --schedule say"),
    "zero_grad_updates": Meaning(
        "updates of the step whose gradient was exactly 0: every advantage 0, or no token kept", "0"
    ),
    "skipped_updates": Meaning(
        "updates of the step that were skipped, their gradient not being finite; absent where none", "absent"
    ),
}

VALUE_METRICS: Mapping[str, Meaning] = {
    "value_loss": Meaning(
        "the critic's loss on the last batch, in its last update; these are there where the run has a critic",
        "falls at first, then follows the rewards",
        "another --critic-optimizer rate; more of the critic's own updates",
    ),
    "value_grad_norm": Meaning(
        "largest L2 norm of the critic's gradient before clipping", "of one order of magnitude throughout"
    ),
    "value_mean": Meaning(
        "mean value over the rollout's tokens, before the critic learns from it", "follows reward_mean"
    ),
    "value_clipped": Meaning(
        "share of tokens, over all the critic's updates, whose value had moved further than the clip", "below a fifth"
    ),
    "value_skipped": Meaning(
        "updates of the critic that were skipped, their gradient not being finite; absent where none", "absent"
    ),
    "explained_variance": Meaning(
        "1 - Var(return - value) / Var(return) over the rollout's tokens, before the critic learns from it: 1 is "
        "perfect, 0 no better than a constant; absent where all returns are equal",
        "below 0 in the first steps, then 0.2 to 0.9",
        "a critic that stays below 0 does harm: more warmup in --critic, another --critic-optimizer rate",
    ),
}

EVALUATION = "evaluation/"
"""Prefix of the figures of evaluations.jsonl, as trackers have them."""


def _described(record: type) -> dict[str, Meaning]:
    """Return the fields of a record with what its docstring says of each."""
    described = inspect.cleandoc(record.__doc__ or "").partition("Args:\n")[2]
    fields = re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", described, flags=re.M)
    meanings = {name: Meaning(" ".join(text.split()), "") for names, text in fields for name in names.split(", ")}
    return {f"{EVALUATION}{name}": meaning for name, meaning in meanings.items()}


EVALUATION_METRICS: Mapping[str, Meaning] = _described(Evaluation)

SECONDS_METRICS: Mapping[str, Meaning] = {
    "seconds/sync": Meaning("seconds in which the sampler took the new weights", "a small share of the step"),
    "seconds/rollout": Meaning(
        "seconds of sampling, environments included; with --async-steps those of waiting for it",
        "the largest share of the step",
        "--engine vllm; --async-steps 1 and --overlap on several devices",
    ),
    "seconds/reward": Meaning(
        "seconds of scoring", "a small share of the step", "more reward_pool.processes, a faster reward"
    ),
    "seconds/update": Meaning("seconds of the step's updates", "less than those of sampling"),
    "seconds/evaluation": Meaning("seconds of an evaluation, after the step", "", "a larger --eval-every"),
    "seconds/checkpoint": Meaning("seconds of writing a checkpoint", "", "a larger --checkpoint-every"),
}

KINDS: Mapping[str, Mapping[str, Meaning]] = {
    "Rollouts": ROLLOUT_METRICS,
    "Endpoints of rewards": ENDPOINT_METRICS,
    "Signal": SIGNAL_METRICS,
    "Length and resampling": FILTER_METRICS,
    "Curriculum": CURRICULUM_METRICS,
    "Turns": TURN_METRICS,
    "Reward parts": PART_METRICS,
    "Tokens": TOKEN_METRICS,
    "Trust region": REGION_METRICS,
    "Tokens by turn": BY_TURN_METRICS,
    "Top-K divergence": DIVERGENCE_METRICS,
    "Auxiliary losses": AUXILIARY_METRICS,
    "Mixtures of experts": ROUTING_METRICS,
    "Updates": UPDATE_METRICS,
    "Critic": VALUE_METRICS,
    "Evaluations": EVALUATION_METRICS,
    "Seconds": SECONDS_METRICS,
}
"""All metrics, by the part of a step that they are of."""

_UPDATE, _ADAPTER = re.compile(r"updates/\d+/"), "drpo/"


def find(name: str) -> tuple[str, Meaning] | None:
    """Return the name and the meaning of a metric, however a file or a tracker writes it; None if there is none.

    Example:
        >>> find("updates/0/k3")[0], find("reward_parts/format")[0], find("evaluation/pass_at/4")[0], find("k4")
        ('k3', 'reward_parts/NAME', 'evaluation/pass_at', None)
    """
    plain = _UPDATE.sub("", name.removeprefix(_ADAPTER))
    if plain.startswith(REWARD_PARTS):
        plain = f"{REWARD_PARTS}NAME"
    if plain.startswith(EVALUATION):
        plain = "/".join(plain.split("/")[:2])
    known = {key: meaning for table in KINDS.values() for key, meaning in table.items()}
    for candidate in (plain, f"{EVALUATION}{plain}", f"seconds/{plain}"):
        if candidate in known:
            return candidate, known[candidate]
    return None
