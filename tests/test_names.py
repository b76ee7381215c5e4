"""The field's words: names that were replaced do not come back, as identifiers, as keys of records, or as flags.

Ordinary English stays ordinary: prose, comments and messages are not looked at. The changelog tells the old names.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.sources import parsed

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("src", "studies", "benchmarks", "cluster", "tests")
NOT_READ = {Path("tests/test_names.py")}

IDENTIFIERS = {
    "Marking": "RewardConfig",
    "appraise": "compute_gae",
    "Lesson": "CriticStats",
    "ValueLearner": "CriticTrainer",
    "Handover": "WeightSync",
    "Drawn": "Generation",
    "Asker": "Request",
    "Batching": "BatchConfig",
    "share_out": "balance_micro_batches",
    "region_radius": "out_of_region",
    "OnGrid": "QuantizedTensor",
    "GridLinear": "QuantizedLinear",
    "Taker": "LoadWeights",
    "lower_through": "fake_quantize_",
    "predicting": "predictor_states",
    "adopt": "enable_packed_attention",
    "Mark": "Scored",
    "marking": "scoring",
    "require_marked": "require_scored",
    "mark_held_out": "score_held_out",
    "refresh_every": "sync_every",
    "own_code": "trust_remote_code",
    "with_learning_rate": "configure",
    "Parts": "Components",
    "handover": "sync",
    "begin_again": "restart",
    "ALONE": "SINGLE_PROCESS",
    "add_gradients": "all_reduce_gradients",
    "failing_together": "reraise_on_all",
    "see_one_device": "select_device",
    "Watcher": "Callback",
    "Together": "CallbackList",
    "TABLE": "REGISTRY",
    "parse_any": "parse_spec",
    "spell": "format_spec",
    "format_call": "format_spec",
    "law": "distribution",
    "laws": "distributions",
    "likeliest": "top_logprobs",
    "Aside": "AuxiliaryOutputs",
    "require_top": "require_top_logprobs",
    "n_places": "n_positions",
    "most_places": "max_positions",
    "vllm_worker": "vllm_patches",
    "foreign_code": "external_code",
    "BEGINS_AGAIN": "RESTARTS",
    "Crew": "PoolSize, WorkerPool",
    "crew": "worker_pool",
    "Lane": "Worker",
    "Arm": "Variant",
    "parse_arm": "parse_variant",
    "Cell": "Trial",
    "CELLS": "TRIALS",
    "read_cell": "read_trial",
    "OUTCOME": "TRIAL_RESULT",
    "Seen": "TokenStatistics",
    "RunFacts": "RunFields",
    "Evidence": "ProbeBatch",
    "lane": "worker",
    "facts": "fields",
    "learner": "CriticTrainer",
    "Terms": "AuxiliaryLosses",
    "Stats": "StepStats",
    "Completion": "Episode",
    "Unmarked": "Unscored",
    "unmarked": "unscored",
    "zeroed": "scored_zero",
    "spelling": "spec",
    "SPELLED": "REGISTRIES",
    "foreign": "external",
    "all_right": "groups_all_correct",
    "all_wrong": "groups_all_wrong",
}
"""In code: names of variables, functions, classes, arguments, attributes and modules."""

KEYS = {
    "refresh_every": "sync_every",
    "own_code": "trust_remote_code",
    "shift_mean": "prob_diff_mean",
    "shift_p99": "prob_diff_p99",
    "shift_max": "prob_diff_max",
    "outside_low": "out_of_region_low",
    "outside_high": "out_of_region_high",
    "drpo/outside": "drpo/out_of_region",
    "held": "masked",
    "all_right": "groups_all_correct",
    "all_wrong": "groups_all_wrong",
    "capped": "ratio_capped",
    "lag_max": "staleness_max",
    "finish": "finish_reason",
    "top_logp": "top_logprobs",
    "cells.json": "trials.json",
    "outcome.json": "trial_result.json",
}
"""Whole strings in code: keys of metrics, records and configurations."""

FLAGS = {
    "--marking.": "--reward-pool.",
    "--refresh-every": "--sync-every",
    "--lag": "--async-steps",
    "--own-code": "--trust-remote-code",
}
"""In code and in pages."""


def sources() -> Iterator[Path]:
    for room in ROOMS:
        yield from (p for p in sorted((ROOT / room).rglob("*.py")) if p.relative_to(ROOT) not in NOT_READ)


def pages() -> Iterator[Path]:
    yield from (p for p in ROOT.glob("*.md") if p.name != "CHANGELOG.md")
    yield from (ROOT / "docs").rglob("*.md")


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every identifier, wherever it stands; those of a node without a line of its own have that of the node before."""
    line = 0
    for node in ast.walk(tree):
        line = getattr(node, "lineno", line)
        for field, value in ast.iter_fields(node):
            if field not in ("value", "kind", "type_comment"):  # a constant's
                found = value if isinstance(value, list) else [value]
                yield from ((line, part) for text in found if isinstance(text, str) for part in text.split("."))


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_old_names_stay_away() -> None:
    found = []
    identifier, key = ("|".join(map(re.escape, table)) for table in (IDENTIFIERS, KEYS))
    any_of = re.compile(rf"""\b({identifier})\b|["']({key})["'{{]""")  # few files are worth a closer look
    for path in sources():
        text = path.read_text()
        for kind, old in ((names, IDENTIFIERS), (strings, KEYS)) if any_of.search(text) else ():
            found += [f"{path}:{line}: {word}: {old[word]}" for line, word in kind(parsed(path)) if word in old]
    for path in [*sources(), *pages()]:
        text = path.read_text()
        found += [f"{path}: {flag}: {new}" for flag, new in FLAGS.items() if flag in text]
    assert not found, "\n".join(found)


def test_an_old_name_would_be_seen() -> None:
    tree = ast.parse(
        'import x.law as y\ndef f(Marking, *, crew: Cell):\n    return {"lag": Marking.adopt(marking=1)}\n'
    )
    old = {"Marking", "adopt", "law", "crew", "Cell", "marking"}
    assert {word for _, word in names(tree)} & IDENTIFIERS.keys() == old
    assert "lag" in {word for _, word in strings(tree)}
