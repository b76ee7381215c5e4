"""Steps, evaluations and samples of a run as the terminal shows them, from its records alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from drpo.errors import counted, one_line, printable
from drpo.report.conversation import Utterance, question, remarks, utterances
from drpo.report.words import mean_score, measure, paired_change
from drpo.terminal import Sheet, as_table
from drpo.train.records import Evaluation
from drpo.train.rollout_record import sampled_lengths

COLUMNS: Mapping[str, tuple[str, str]] = {
    "reward": ("reward_mean", "{:.3f}"),
    "length": ("length_terminated", "{:.1f}"),
    "cut": ("truncated", "{:.0%}"),
    "entropy": ("entropy", "{:.2f}"),
    "|π-μ|": ("prob_diff_mean", "{:.4f}"),
    "p99": ("prob_diff_p99", "{:.3f}"),
    "out_of_region": ("out_of_region", "{:.2%}"),
    "w min": ("weight_min", "{:.2f}"),
    "max|r·w|": ("scaled_weight_max", "{:.2f}"),
    "grad": ("grad_norm", "{:.3g}"),
}
"""Heading -> the metric under it, and how it is written."""
TURN_COLUMNS: Mapping[str, tuple[str, str]] = {"turns": ("turns", "{:.1f}"), "done": ("episodes_done", "{:.0%}")}
"""The same, of runs whose episodes are in environments."""
CURRICULUM_COLUMNS: Mapping[str, tuple[str, str]] = {
    name: (f"curriculum_{name}", "{:.0%}") for name in ("active", "easy", "hard")
}
"""The same, of runs with a curriculum."""
SFT_COLUMNS: Mapping[str, tuple[str, str]] = {
    "loss": ("nll", "{:.4f}"),
    "held-out": ("held_out_nll", "{:.4f}"),
    "entropy": ("entropy", "{:.2f}"),
    "grad": ("grad_norm", "{:.3g}"),
    "rate": ("learning_rate", "{:.3g}"),
    "tokens": ("trained_tokens", "{:,}"),
    "epoch": ("epoch", "{:.2f}"),
}
"""The columns of supervised fine-tuning."""
_MOST_CHARACTERS = 600
_UNREADABLE = 1 / 3
"""Share of characters that cannot be shown from which on a sample is no text."""
"""Of a message of a conversation that is shown."""


def cells(step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, str]:
    """Return a step's row of a table, by heading: its number, its `COLUMNS`, its seconds; "-" for what is not known."""
    pools = CURRICULUM_COLUMNS if "curriculum_active" in metrics else {}
    base = SFT_COLUMNS if "nll" in metrics else COLUMNS
    columns = {**base, **(TURN_COLUMNS if "turns" in metrics else {}), **pools}
    shown = {name: form.format(metrics[key]) if key in metrics else "-" for name, (key, form) in columns.items()}
    return {"step": str(step), **shown, "s": f"{sum(seconds.values()):.1f}" if seconds else "-"}


def table(rows: Iterable[Mapping[str, str]]) -> Table:
    """Return rows of `cells`, at least one, under their headings."""
    listed = list(rows)
    head = max(map(tuple, listed), key=len)
    return as_table(Sheet("", head, tuple(tuple(row.get(name, "-") for name in head) for row in listed)), left=0)


def steps_bar(console: Console, label: str) -> Progress:
    """Return a progress bar that counts steps, with the time so far and the time left.

    Args:
        console: where it is drawn.
        label: the text before the bar, with the task's fields in rich's form.
    """
    return Progress(
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def turn_figures(metrics: Mapping[str, Any]) -> str:
    """Return a step's figures of turns in a line; empty where no episode is in an environment.

    Example:
        >>> turn_figures({"turns": 2.125, "turns_max": 3, "turn_tokens": 7.06, "episodes_done": 0.4375, "calls": 0.5})
        'turns: 2.12 on average, 3 at most, 7.1 tokens each, 44% of episodes done, 0.5 calls'
    """
    forms = {
        "turns": "{:.3g} on average",
        "turns_max": "{:.0f} at most",
        "turn_tokens": "{:.1f} tokens each",
        "episodes_done": "{:.0%} of episodes done",
        "calls": "{:.3g} calls",
        "failed_calls": "{:.3g} failed calls",
        "branches": "{:.3g} branches",
        "environment_failed": "{:.0f} environments failed",
    }
    optional = ("calls", "failed_calls", "branches", "environment_failed")
    shown = [f.format(metrics[k]) for k, f in forms.items() if k in metrics and (metrics[k] or k not in optional)]
    return f"turns: {', '.join(shown)}" if "turns" in metrics else ""


def sample_panel(record: Mapping[str, Any]) -> Panel:
    """Return an episode in a box: as a conversation where it was in an environment, else as a text under its prompt.

    Control characters, which could steer the terminal, are shown as U+FFFD.

    Args:
        record: of rollouts.jsonl.
    """
    reward = record.get("reward")
    style = "green" if reward and reward > 0 else "yellow"
    title = f"a sample, {scored(reward)}"
    if "messages" in record:
        lengths = sampled_lengths(record)
        title = ", ".join([title, *(text for text, _ in remarks(record, lengths))])
        return Panel(_conversation(utterances(record, lengths), style), title=title, title_align="left")
    prompt, text = (printable(record.get(name, "")) for name in ("prompt", "text"))
    body = Text.assemble((prompt, "dim"), "\n", (no_text(text) or text.strip() or "(nothing)", style))
    return Panel(body, title=title, title_align="left")


def no_text(text: str) -> str:
    r"""Say in words that a completion is mostly bytes that no terminal shows, as a random model's are; "" for a text.

    Example:
        >>> no_text("It is 7."), no_text("\x00\ufffd+\x1f")
        ('', '(no text: 3 of 4 characters cannot be shown, as of a random model)')
    """
    shown = printable(text)
    lost = shown.count("\ufffd")
    if lost < _UNREADABLE * len(shown) or not lost:
        return ""
    return f"(no text: {lost} of {counted(len(shown), 'character')} cannot be shown, as of a random model)"


def scored(reward: float | None) -> str:
    """Return a reward in words."""
    return "not scored" if reward is None else f"reward {reward:g}"


def _conversation(said: Sequence[Utterance], style: str) -> RenderableType:
    """Return a row for each message from the question on: who speaks, and what, the model's turns in a style."""
    begin = question(said)
    rows = Table.grid(padding=(0, 1))
    rows.add_column(justify="right", no_wrap=True, max_width=16, style="dim")
    rows.add_column(overflow="fold")
    if begin:
        rows.add_row("", Text(f"({counted(begin, 'message')} before)", style="dim"))
    for u in said[begin:]:
        if u.branch:
            rows.add_row("", Text("branch: the history is rendered anew", style="yellow"))
        rows.add_row(one_line(f"{u.role} {u.name}" if u.name else u.role), _said(u, style))
    return rows


def _said(u: Utterance, style: str) -> Text:
    text = printable(u.text).strip()
    text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    styles = {"assistant": style if u.turn is not None else "dim", "tool": "cyan"}
    parts = [(text or "(nothing)", styles.get(u.role, ""))]
    if u.reward is not None:
        parts.append((f"  [reward {u.reward:g}]", "dim"))
    if u.failed:
        parts.append(("  [failed call]", "yellow"))
    return Text.assemble(*parts, *((f"\ncalls {one_line(call)}", "cyan") for call in u.calls))


def brief_conversation(record: Mapping[str, Any], most: int = 60) -> str:
    """Return an episode in an environment in a line, from the question on, each message cut to so many characters.

    Example:
        >>> messages = [{"role": "user", "content": "5?"}, {"role": "assistant", "content": "7"}]
        >>> brief_conversation({"messages": messages, "turns": [2]})
        "user '5?' -> assistant '7'"
    """
    said = utterances(record, sampled_lengths(record))

    def shown(u: Utterance) -> str:
        text = u.text if len(u.text) <= most else f"{u.text[:most]}..."
        return f"{one_line(u.role)} {text!r}{'' if u.reward is None else f' (reward {u.reward:g})'}"

    return " -> ".join(map(shown, said[question(said) :]))


def result(evaluation: Evaluation) -> str:
    """Return an evaluation in a line."""
    when = "before training" if evaluation.step == 0 else f"after {counted(evaluation.step, 'step')}"
    k, n = evaluation.n_samples, evaluation.n_problems
    mean, interval = mean_score(evaluation.reward_mean, evaluation.low, evaluation.high)
    change = _from_step_0(evaluation, shares=bool(interval))
    name = measure(evaluation.reward_mean, evaluation.pass_at[1], bool(interval))
    parts = "".join(f"; {printable(part)} {value:.3g}" for part, value in evaluation.reward_parts.items())
    if not interval:
        return f"held-out {name} {when}: {mean} ({n} problems, avg@{k}){change}{parts}"
    extra = f", pass@{k} {evaluation.pass_at[k]:.1%}" if k > 1 else ""
    return f"held-out {name} {when}: {mean} ({interval}, {n} problems, avg@{k}{extra}){change}{parts}"


def _from_step_0(evaluation: Evaluation, shares: bool) -> str:
    if evaluation.difference is None:
        return ""
    low, high = evaluation.difference_low, evaluation.difference_high
    text, interval = paired_change(evaluation.difference, low, high, shares)
    return f"; {text} from step 0{interval and f' ({interval})'}"
