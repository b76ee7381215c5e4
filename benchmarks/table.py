"""The results as a page of Markdown; a pure function of the results' file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.rounds import column, floors, ratios, summary

Record = Mapping[str, Any]
Row = list[str]

HOW = (
    "Every figure is the median over rounds, with the least and the greatest in brackets. In a round every competitor "
    "of a case runs once, one after the other, with as many threads as the machine has cores; ratios are taken within "
    "rounds, so that a machine that grows slower or faster meanwhile does not change them. Extra memory is the most "
    "that was held beyond what was held before (resident memory; on a GPU, allocated memory)."
)


def render(results: Record) -> str:
    """Return the page.

    Args:
        results: "machine" and "cases", as they stand in the file.

    Returns:
        Markdown; a part that was not measured is left out.
    """
    lines = ["# Benchmarks", "", _machine(results["machine"]), "", HOW, ""]
    for part, (title, intro, header, rows) in PARTS.items():
        found = [c for c in results["cases"] if c["part"] == part]
        if not found:
            continue
        lines += [f"## {title}", "", intro, ""]
        lines += _table(header, [row for case in found if case["rounds"] for row in rows(case)])
        lines += ["", *_notes(found), ""]
    return "\n".join(lines).rstrip() + "\n"


def headline(case: Record) -> str:
    """Return a case in a few lines for the terminal: seconds of each entrant, or why there are none.

    Args:
        case: as `rounds.measure` returns it.
    """
    lines = [f"{case['part']}: {case['name']}"]
    for name in case["entrants"]:
        seconds = column(case["rounds"], name, "seconds")
        lines.append(f"  {name:<20} {spread(seconds, unit=' s') if seconds else case['failures'].get(name, 'nothing')}")
    return "\n".join(lines)


def _machine(machine: Record) -> str:
    flags = ", ".join(name for name, present in machine["flags"].items() if present) or "no AVX"
    hardware = machine["accelerator"] or f"{machine['processor']}, {machine['cores']} cores ({flags})"
    return (
        f"{hardware}, {machine['memory_gib']} GiB of memory; {machine['system']}, Python {machine['python']}, "
        f"torch {machine['torch']}."
    )


def _table(header: Sequence[str], rows: Sequence[Row]) -> list[str]:
    ruler = ["---", "---", *["---:"] * (len(header) - 2)]
    return [f"| {' | '.join(row)} |" for row in (header, ruler, *rows)]


def _notes(cases: Sequence[Record]) -> list[str]:
    """Who took part with which settings, and who did not and why; each thing said once."""
    settings = {(n, c["about"][n]["settings"]): None for c in cases if c["part"] != "growth" for n in c["about"]}
    settings |= {("drpo", a["settings"]): None for c in cases if c["part"] == "growth" for a in c["about"].values()}
    failed: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, why in case["failures"].items():
            failed.setdefault((name, why), []).append(case["name"])
    notes = [f"- {name}: {text}." for name, text in settings]
    for (name, why), where in failed.items():
        place = "everywhere" if len(where) == len(cases) else "; ".join(where)
        notes.append(f"- **{name} has no figure** ({place}): {why}")
    return notes


def number(x: float) -> str:
    """Return three significant digits, no exponent.

    Example:
        >>> number(0.01234), number(12.345), number(12345.6), number(0)
        ('0.0123', '12.3', '12,346', '0.00')
    """
    size = abs(x)
    if size >= 100 or size == 0:
        return f"{x:,.0f}" if size else "0.00"
    digits = 2 if size < 10 else 1
    while size < 1 and round(size, digits) < 10 ** (2 - digits) and digits < 6:
        digits += 1
    return f"{x:.{digits}f}"


def spread(values: Sequence[float], scale: float = 1.0, unit: str = "") -> str:
    """Return "median (least to greatest)", or a dash where there is nothing.

    Example:
        >>> spread([3.0, 1.0, 2.0], unit="x")
        '2.00x (1.00 to 3.00)'
    """
    found = summary([v * scale for v in values])
    return "-" if found is None else f"{number(found[0])}{unit} ({number(found[1])} to {number(found[2])})"


def middle(values: Sequence[float], scale: float = 1.0) -> str:
    """Return the median alone, or a dash."""
    found = summary(values)
    return "-" if found is None else number(found[0] * scale)


def _against(case: Record, name: str) -> str:
    return "1" if name == case["baseline"] else spread(ratios(case["rounds"], name, case["baseline"]), unit="x")


def _step_rows(case: Record) -> list[Row]:
    rounds = case["rounds"]
    rows = []
    for name in (n for n in case["entrants"] if n != "matrix products"):
        seconds = column(rounds, name, "seconds")
        phases = [middle(column(rounds, name, f"phases.{p}")) for p in ("rollout", "reward", "update", "sync")]
        rows.append(
            [
                case["name"],
                name,
                spread(seconds),
                middle([3600 / s for s in seconds]),
                _against(case, name),
                *phases,
                middle(column(rounds, name, "tokens")),
                middle(column(rounds, name, "skipped")),
                " / ".join(middle(floors(case, name, shared=shared)) for shared in (False, True)),
                middle(column(rounds, name, "peak_bytes"), 2**-30),
                middle(column(rounds, name, "extra_bytes"), 2**-20),
                str(len(seconds)),
            ]
        )
    return rows


def _rollout_rows(case: Record) -> list[Row]:
    rounds = case["rounds"]
    rows = []
    for name in case["entrants"]:
        seconds, tokens = column(rounds, name, "seconds"), column(rounds, name, "tokens")
        rate = [n / s for n, s in zip(tokens, seconds, strict=True)]
        extra = middle(column(rounds, name, "extra_bytes"), 2**-20)
        rows.append([case["name"], name, spread(rate), spread(seconds), _against(case, name), extra, str(len(seconds))])
    return rows


def _head_rows(case: Record) -> list[Row]:
    rounds, parameters = case["rounds"], case["parameters"]
    rows = []
    for name in case["entrants"]:
        seconds, extra = column(rounds, name, "seconds"), column(rounds, name, "extra_bytes")
        rows.append(
            [
                case["name"],
                name,
                spread(seconds, 1000),
                middle([parameters["flops"] / s for s in seconds], 1e-12),
                spread(ratios(rounds, name, "products alone"), unit="x"),
                _against(case, name),
                middle(extra, 2**-20),
                middle(extra, 1 / parameters["logits_bytes"]),
                str(len(seconds)),
            ]
        )
    return rows


def _head_parts_rows(case: Record) -> list[Row]:
    rounds = case["rounds"]
    rows = []
    for name in (n for n in case["entrants"] if n in case["about"]):
        seconds, extra = column(rounds, name, "seconds"), column(rounds, name, "extra_bytes")
        rows.append(
            [case["name"], name, spread(seconds, 1000), _against(case, name), middle(extra, 2**-20), str(len(seconds))]
        )
    return rows


def _growth_rows(case: Record) -> list[Row]:
    rounds = case["rounds"]
    rows: list[Row] = []
    for before, name in zip([None, *case["entrants"]], case["entrants"], strict=False):
        seconds = column(rounds, name, "seconds")
        grown = [_grown(case, name, before, field) for field in ("seconds", "extra_bytes")]
        extra = middle(column(rounds, name, "extra_bytes"), 2**-20)
        rows.append([case["name"], name, spread(seconds), grown[0], extra, grown[1], str(len(seconds))])
    return rows


def _grown(case: Record, name: str, before: str | None, field: str) -> str:
    return "" if before is None else spread(ratios(case["rounds"], name, before, field), unit="x")


def _mismatch_rows(case: Record) -> list[Row]:
    rounds = case["rounds"]
    rows = []
    for name in (n for n in case["entrants"] if n in case["about"]):
        seconds, tokens = column(rounds, name, "seconds"), column(rounds, name, "tokens")
        found = [spread(column(rounds, name, f)) for f in ("k3", "mean_ratio", "mean_gap", "p99_gap")]
        far = spread(column(rounds, name, "far"), 100, unit=" %")
        rate = middle([n / s for n, s in zip(tokens, seconds, strict=True)])
        rows.append([case["name"], name, *found, far, rate, str(len(seconds))])
    return rows


def _overlap_rows(case: Record) -> list[Row]:
    rounds = case["rounds"]
    rows = []
    for name in (n for n in case["entrants"] if n in case["about"]):
        phases = [middle(column(rounds, name, f"phases.{p}")) for p in ("rollout", "update", "sync")]
        seconds = column(rounds, name, "seconds")
        rows.append([case["name"], name, spread(seconds), _against(case, name), *phases, str(len(seconds))])
    return rows


def _turns_rows(case: Record) -> list[Row]:
    rounds = case["rounds"]
    rows = []
    for name in (n for n in case["entrants"] if n in case["about"]):
        seconds, tokens = column(rounds, name, "seconds"), column(rounds, name, "tokens")
        each = spread([s / n for s, n in zip(seconds, tokens, strict=True)], 1000)
        context, extra = middle(column(rounds, name, "context")), middle(column(rounds, name, "extra_bytes"), 2**-20)
        rows.append([case["name"], name, each, _against(case, name), context, extra, str(len(seconds))])
    return rows


def _resampling_rows(case: Record) -> list[Row]:
    names = ("groups_with_signal", "groups", "sampled_groups", "tokens", "seconds")
    rows = []
    for who in (n for n in case["entrants"] if n in case["about"]):
        signals, groups, sampled, tokens, seconds = (sum(column(case["rounds"], who, name)) for name in names)
        each = [seconds / signals] if signals else []
        rows.append(
            [
                case["name"],
                who,
                f"{signals:.0f} of {groups:.0f}",
                f"{sampled:.0f}",
                middle([100 * signals / sampled] if sampled else []),
                middle([tokens / signals] if signals else []),
                middle(each),
                str(len(column(case["rounds"], who, "seconds"))),
            ]
        )
    return rows


def _checkpointing_rows(case: Record) -> list[Row]:
    rounds = case["rounds"]
    rows = []
    for name in (n for n in case["entrants"] if n in case["about"]):
        seconds, extra = column(rounds, name, "seconds"), column(rounds, name, "extra_bytes")
        memory = "1" if name == case["baseline"] else spread(ratios(rounds, name, case["baseline"], "extra_bytes"))
        rows.append(
            [
                case["name"],
                name,
                spread(seconds),
                _against(case, name),
                middle(extra, 2**-20),
                memory,
                str(len(seconds)),
            ]
        )
    return rows


def _kernels_rows(case: Record) -> list[Row]:
    return [
        [
            case["name"],
            check,
            figure,
            f"{error:.1e}",
            f"{answer['plain'][figure]:.1e}",
            "yes" if answer["within"] else "**no**",
            answer["backend"],
        ]
        for answers in case["rounds"]
        for check, answer in answers.items()
        for figure, error in answer["errors"].items()
    ]


def _sharding_rows(case: Record) -> list[Row]:
    rows = []
    for name, answer in (pair for answers in case["rounds"] for pair in answers.items()):
        for way, record in answer["ways"].items():
            norms = ", ".join(number(norm) for norm in record["grad_norms"])
            peak = "-" if record["peak_bytes"] is None else number(record["peak_bytes"] / 2**30)
            against = number(record["seconds"] / answer["seconds"])
            rows.append(
                [case["name"], f"{name}, {way}", answer["backend"], number(record["seconds"]), against, norms, peak]
            )
    return rows


def _tests_rows(case: Record) -> list[Row]:
    return [
        [case["name"], *(str(answer[end]) for end in ("passed", "failed", "skipped")), number(answer["seconds"])]
        for answer in (r["pytest"] for r in case["rounds"] if "pytest" in r)
    ]


def _edges_rows(case: Record) -> list[Row]:
    rounds = case["rounds"]
    rows = []
    for name in (n for n in case["entrants"] if n in case["about"]):
        seconds, cpu = column(rounds, name, "seconds"), spread(column(rounds, name, "cpu_seconds"))
        extra = middle(column(rounds, name, "extra_bytes"), 2**-20)
        rows.append([case["name"], name, spread(seconds), cpu, _against(case, name), extra, str(len(seconds))])
    return rows


Renderer = Callable[[Record], list[Row]]
PARTS: Mapping[str, tuple[str, str, Sequence[str], Renderer]] = {
    "step": (
        "One training step",
        "Seconds of one whole step: rollout, rewards, one optimiser update. In `full` no completion ends early, so all "
        "train on exactly as many tokens; in `natural` the end-of-text token ends one. `hash` marks a text by its "
        "hash, so no group is skipped; with `exact` this project skips groups whose rewards are all equal. The floor "
        "is the operations of all matrix products, with each prompt counted once per sample / once per group, at the "
        "rate that one large product reached in the same rounds. TRL's update is all that is neither generation nor "
        "reward; `a x b` is how many completions go through the model at once there, and how often. Times / drpo are "
        "ratios of steps per hour too.",
        (
            "case",
            "who",
            "s/step",
            "steps/h",
            "time / drpo",
            "rollout s",
            "reward s",
            "update s",
            "sync s",
            "tokens",
            "skipped rows",
            "times the floor",
            "peak GiB",
            "extra MiB",
            "rounds",
        ),
        _step_rows,
    ),
    "rollout": (
        "Rollouts",
        "Tokens per second of whole calls, tokenizing and decoding included; no completion ends early; 8 samples a "
        "prompt where there are 8 rows or more.",
        ("case", "who", "tokens/s", "s", "time / drpo", "extra MiB", "rounds"),
        _rollout_rows,
    ),
    "head": (
        "The head",
        "Forward and backward from hidden states to the gradients of hidden states and weight. `products alone` is the "
        "floor: the three matrix products and nothing else. TFLOP/s count these three products for everyone.",
        (
            "case",
            "who",
            "ms",
            "TFLOP/s",
            "time / products",
            "time / linear_policy_loss",
            "extra MiB",
            "extra / logits",
            "rounds",
        ),
        _head_rows,
    ),
    "head_parts": (
        "Bias, scale and soft cap",
        "Forward and backward of the weight alone, and with a bias that is trained, a scale of 0.5, a soft cap of 30, "
        "and all of them. Times are ratios to the weight alone.",
        ("case", "head", "ms", "times the weight alone", "extra MiB", "rounds"),
        _head_parts_rows,
    ),
    "head_objectives": (
        "Objectives of sequences and of the batch",
        "Forward and backward of the fused head with an objective of single tokens (three products), with objectives "
        "that read the whole sequence, and with those that read statistics of the batch (four products). Times are "
        "ratios to drpo(0.2).",
        ("case", "objective", "ms", "times drpo(0.2)", "extra MiB", "rounds"),
        _head_parts_rows,
    ),
    "growth": (
        "Growth",
        "One update (batching, forward, backward, optimiser) as one size doubles, and the factors per doubling.",
        ("what doubles", "size", "s", "time factor", "extra MiB", "memory factor", "rounds"),
        _growth_rows,
    ),
    "mismatch": (
        "Mismatch",
        "The same weights in the sampler and in the trainer, none of which ever changes: how far mu, as the sampler "
        "reported it, is from pi of the trainer's forward pass, over all sampled tokens. k3 is the mean of "
        "r - 1 - log r, r = pi / mu; the gap is |pi - mu|, and far the share of tokens where it is above 0.15. "
        "Tokens/s are the rollout's.",
        ("case", "who", "k3", "mean r", "mean gap", "p99 gap", "far", "tokens/s", "rounds"),
        _mismatch_rows,
    ),
    "overlap": (
        "Sampling in the background",
        "Seconds of the same short run with `--async-steps 1`, the next rollout sampled before the update and "
        "meanwhile (`--overlap`); it is the same run to the bit. Times are ratios to `in turn`. What is waited for the "
        "sampler stands under rollout and sync. The second case says what there is to gain where sampling costs "
        "the trainer's machine nothing.",
        ("sampler", "schedule", "s", "times in turn", "rollout s", "update s", "sync s", "rounds"),
        _overlap_rows,
    ),
    "neighbours": (
        "Beside a busy program",
        "Seconds of the same step of the same process, alone and while another program keeps one core busy. Fair "
        "shares of two cores would make it 1.5 times.",
        ("case", "who", "s", "times alone", "rollout s", "update s", "sync s", "rounds"),
        _overlap_rows,
    ),
    "turns": (
        "Turns of an episode",
        "Milliseconds per sampled token of whole episodes, reading included, 8 samples a prompt. `kept`: a row's keys "
        "and values stay from turn to turn, so that a later turn reads only what is new; `read anew`: it reads its "
        "whole context. `one turn` samples as many tokens at once, after a prompt that has what is heard between the "
        "turns too, so that its context is as long at the end. `turns apart` are rollouts of one turn, each with "
        "prompts as long as the context of an episode's turn, which a group shares.",
        ("case", "who", "ms a token", "times one turn", "context at the end", "extra MiB", "rounds"),
        _turns_rows,
    ),
    "resampling": (
        "Dynamic sampling",
        "Groups with a signal, of those of the step and of all that were sampled for it; what one of them costs in "
        "sampled tokens and in seconds of the whole step. Sums over the rounds; both entrants of a round have the "
        "same weights, seed and problems.",
        (
            "task",
            "sampling",
            "groups with a signal",
            "groups sampled",
            "% with a signal",
            "tokens a signal",
            "s a signal",
            "rounds",
        ),
        _resampling_rows,
    ),
    "checkpointing": (
        "Activation checkpointing",
        "One update (batching, forward, backward, optimiser) with all activations kept, and with each layer computed "
        "again in the backward pass (`--checkpoint-activations on`); gradients are the same.",
        ("case", "layers computed again", "s", "times off", "extra MiB", "memory / off", "rounds"),
        _checkpointing_rows,
    ),
    "kernels": (
        "Kernels against float64",
        "The largest error of each figure, as a share of the largest true value, and that of plain PyTorch in the same "
        "precision. `rows` are the row operations on logits; the operators' figures are gradients.",
        ("case", "what", "figure", "error", "plain PyTorch's", "within its budget", "rows by"),
        _kernels_rows,
    ),
    "sharding": (
        "Whole and divided models",
        "One update (forward, backward, optimiser) on the same made-up completions, the median of all but the first, "
        "and the norms of its gradients, which must agree.",
        ("case", "who", "backend", "s", "time / whole", "gradient norms", "peak GiB"),
        _sharding_rows,
    ),
    "tests": (
        "Tests",
        "Tests of the repository that need this hardware.",
        ("which", "passed", "failed", "skipped", "s"),
        _tests_rows,
    ),
    "edges": (
        "Around the step",
        "Rewards of a microsecond in processes; the report of a long run, against parsing its records; resuming it, "
        "until the next step begins, against hashing its records; a comparison of tiny trials in one worker, started "
        "as a command. Its runs are two steps of a tiny model and made-up records, 32 tokens a rollout, all trained. "
        "CPU seconds are the worker's own, and in comparisons those of the command.",
        ("case", "who", "s", "CPU s", "times the first", "extra MiB", "rounds"),
        _edges_rows,
    ),
}
