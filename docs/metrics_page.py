"""Writes docs/metrics.md and docs/warnings.md from what the source says of each; a test checks that they are current.

python docs/metrics_page.py
"""

from collections.abc import Mapping
from pathlib import Path

from drpo.train.metric_tables import KINDS, Meaning
from drpo.train.run_warnings import RULES, Rule

PAGE, WARNINGS = (Path(__file__).with_name(name) for name in ("metrics.md", "warnings.md"))

HEAD = """<!-- written by docs/metrics_page.py; change drpo/train/metric_tables.py instead -->
# Metrics

`metrics.jsonl` has a line for each step, counted from 1. Each figure is a ratio of sums over all its items, not a
mean of means. [Trackers](runs.md#trackers) get the same names. `pi` is the policy when the token was trained on, `mu`
the sampler, `r = pi/mu`, `w` the [gradient weight](concepts.md#gradient-weight). What is normal is what sound runs of
the size of the recipes have; it is no limit. Where a [warning](warnings.md) reads a metric, it is named.

```bash
drpo explain k3
```

prints the same on the terminal, of any metric or warning; `drpo explain` alone lists them. It also describes what an
option names: `drpo explain gdpo`, `drpo explain judge`.
"""

WORDS: Mapping[str, str] = {
    "Rollouts": "Over the step's completions.",
    "Signal": "Of the advantages that the step trained with ([no learning signal](doctor.md#no-learning-signal)).",
    "Endpoints of rewards": (
        "Where the reward is a [judge or another service](rewards.md#a-judge-or-a-service); evaluations have them too."
    ),
    "Length and resampling": (
        "Counts, absent where 0, of [`--overlong`](methods.md#long-completions) and\n"
        "[`--dynamic-sampling`](methods.md#dynamic-sampling)."
    ),
    "Curriculum": "With [`--curriculum`](methods.md#curriculum).",
    "Turns": "Over the step's episodes, where they are in environments.",
    "Reward parts": "One for each part of the reward.",
    "Tokens": (
        "Over the tokens that were trained on, in all updates of the step. An objective's own per-token metrics are\n"
        "added, as means. If every completion of a step is skipped, only `trained_tokens` is present."
    ),
    "Trust region": (
        "Where the objective has a method `out_of_region`; a region that is not symmetric shows in the two sides."
    ),
    "Tokens by turn": (
        "Of the same tokens, where episodes are in environments; of the turns that there are\n"
        "([drift by turn](agents.md#drift-by-turn))."
    ),
    "Top-K divergence": "Where the objective reads one.",
    "Auxiliary losses": "Over the same tokens.",
    "Mixtures of experts": "With [`--routing-replay`](precision.md#routing-replay).",
    "Updates": (
        "`loss` and `learning_rate` are those of the step's last update, `grad_norm` is the largest. Where a step has\n"
        "several updates, `updates` is a list with these and the figures of tokens for each; trackers call them\n"
        "`updates/0/loss`."
    ),
    "Critic": "With [`--critic`](ppo_critic.md).",
    "Evaluations": (
        "`evaluations.jsonl` has a line for each; trackers alone write `evaluation/` before the names\n"
        "([what these intervals are worth](statistics.md#intervals-of-one-evaluation))."
    ),
    "Seconds": (
        "`timing.jsonl` has those of each step, and those of evaluations and checkpoints in lines of their own;\n"
        "trackers alone write `seconds/` before the names."
    ),
}

TAIL = """
For remedies see also the symptoms on [each objective's page](objectives/index.md), and the [doctor](doctor.md).
"""

WARNINGS_HEAD = """<!-- written by docs/metrics_page.py; change drpo/train/run_warnings.py instead -->
# Warnings

While a run trains, each step asks its metrics whether something goes wrong that has gone wrong for others. What is
found is said in a line, with what to do. It changes nothing, the exit status neither. The same warnings are

- lines on the terminal: when one begins, and again when it has lasted twice as long; where it comes and goes, the
  first, second, fourth, eighth time;
- `warnings` in `summary.json`: `name`, `first_step`, `last_step`, the number of `steps` at which it held, how many
  `times` it began, the `text` as of its last step, the `page` to read, and whether it is `ongoing` at the end; of
  steps in a row without a signal the first step is the first of them, not the third, at which it is said;
- in [the report](report.md), of any run's records, and in [`drpo watch`](runs.md#watching-a-run);
- alerts of Weights & Biases and Trackio, and texts `warnings/NAME` of TensorBoard ([trackers](runs.md#trackers)).

```bash
drpo explain truncation
```

prints a section of this page. Warnings depend on `metrics.jsonl` and `evaluations.jsonl` alone: a run that was killed
and resumed has those of the run that was not.

"First" are a run's first 5 steps and "last" its last 5. What compares the two is silent for 10 steps, so it says
nothing of shorter runs. There are no options. Each threshold lies where the committed records of runs that learn do
not come near and where planted failures do: `tests/test_warnings.py` names each of these as it should, and the sound
runs raise none. Those records are of a small model and of short runs. For yours, read a warning as a question.

| warning | |
|---|---|
"""


def page() -> str:
    """Return the whole page of metrics."""
    parts = [f"\n## {title}\n\n{WORDS[title]}\n\n{table(metrics)}\n" for title, metrics in KINDS.items()]
    return HEAD + "".join(parts) + TAIL


def table(metrics: Mapping[str, Meaning]) -> str:
    """Return a table of names and meanings."""
    rows = [
        f"| `{name}` | {_cell(m.text)} | {_cell(m.normal)} | {_cell(_to_do(name, m))} |" for name, m in metrics.items()
    ]
    return "\n".join(["| | | normal | what to do |", "|---|---|---|---|", *rows])


def _to_do(name: str, meaning: Meaning) -> str:
    warnings = [f"[{rule.name}](warnings.md#{rule.name})" for rule in RULES if name in rule.reads]
    return "; ".join(filter(None, [meaning.advice, ", ".join(warnings)]))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def warnings_page() -> str:
    """Return the whole page of warnings."""
    rows = [f"| [`{rule.name}`](#{rule.name}) | {rule.means} |\n" for rule in RULES]
    return WARNINGS_HEAD + "".join(rows) + "".join(map(section, RULES))


def section(rule: Rule) -> str:
    """Return the section of a warning."""
    reads = ", ".join(f"`{name}`" for name in rule.reads)
    lines = (
        rule.means,
        f"- **Raised at:** {rule.threshold}.\n- **Why there:** {rule.reason}\n- **What to do:** {rule.advice}.",
        f"Reads {reads} ([metrics](metrics.md)).",
    )
    return f"\n## {rule.name}\n\n" + "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    WARNINGS.write_text(warnings_page(), encoding="utf-8")
