"""Writes docs/metrics.md from the source's description of each metric; a test checks that it is current.

python docs/metrics_page.py
"""

from collections.abc import Mapping
from pathlib import Path

from drpo.train.metrics import (
    AUXILIARY_METRICS,
    BY_TURN_METRICS,
    DIVERGENCE_METRICS,
    FILTER_METRICS,
    PART_METRICS,
    REGION_METRICS,
    ROLLOUT_METRICS,
    ROUTING_METRICS,
    TOKEN_METRICS,
    TURN_METRICS,
    UPDATE_METRICS,
    VALUE_METRICS,
)

PAGE = Path(__file__).with_name("metrics.md")

HEAD = """<!-- written by docs/metrics_page.py; change drpo/train/metrics.py instead -->
# Metrics

`metrics.jsonl` has a line for each step, counted from 1. Each figure is a ratio of sums over all its items, not a
mean of means. [Trackers](runs.md#trackers) get the same names. `pi` is the policy when the token was trained on, `mu`
the sampler, `r = pi/mu`, `w` the [gradient weight](concepts.md#gradient-weight).
"""

PARTS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("Rollouts", "Over the step's completions.", ROLLOUT_METRICS),
    (
        "Length and resampling",
        "Counts, absent where 0, of [`--overlong`](methods.md#long-completions) and\n"
        "[`--dynamic-sampling`](methods.md#dynamic-sampling).",
        FILTER_METRICS,
    ),
    ("Turns", "Over the step's episodes, where they are in environments.", TURN_METRICS),
    ("Reward parts", "One for each part of the reward.", PART_METRICS),
    (
        "Tokens",
        "Over the tokens that were trained on, in all updates of the step. An objective's own per-token metrics are\n"
        "added, as means. If every completion of a step is skipped, only `trained_tokens` is present.",
        TOKEN_METRICS,
    ),
    (
        "Trust region",
        "Where the objective has a method `out_of_region`; a region that is not symmetric shows in the two sides.",
        REGION_METRICS,
    ),
    (
        "Tokens by turn",
        "Of the same tokens, where episodes are in environments; of the turns that there are\n"
        "([drift by turn](agents.md#drift-by-turn)).",
        BY_TURN_METRICS,
    ),
    ("Top-K divergence", "Where the objective reads one.", DIVERGENCE_METRICS),
    ("Auxiliary losses", "Over the same tokens.", AUXILIARY_METRICS),
    ("Mixtures of experts", "With [`--routing-replay`](precision.md#routing-replay).", ROUTING_METRICS),
    (
        "Updates",
        "`loss` and `learning_rate` are those of the step's last update, `grad_norm` is the largest. Where a step has\n"
        "several updates, `updates` is a list with these and the figures of tokens for each; trackers call them\n"
        "`updates/0/loss`.",
        UPDATE_METRICS,
    ),
    ("Critic", "With [`--critic`](ppo_critic.md).", VALUE_METRICS),
)

TAIL = """
## Other files

`evaluations.jsonl` has `reward_mean` (avg@k) with `low` and `high`, its 95 % interval, `pass_at`, `mean_length`,
`truncated`, `failed`, `problem_means`, and `difference` from step 0 over the same problems, with `difference_low` and
`difference_high` ([what these intervals are worth](statistics.md#intervals-of-one-evaluation));
`timing.jsonl` has the seconds of `sync`, `rollout`, `reward` and `update` of each step,
and those of `evaluation` and `checkpoint` in lines of their own. For remedies see the symptoms on
[each objective's page](objectives/index.md), and the [doctor](doctor.md).
"""


def table(figures: Mapping[str, str]) -> str:
    """Return a table of names and meanings."""
    rows = [f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in figures.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def page() -> str:
    """Return the whole page."""
    parts = [f"\n## {title}\n\n{words}\n\n{table(figures)}\n" for title, words, figures in PARTS]
    return HEAD + "".join(parts) + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
