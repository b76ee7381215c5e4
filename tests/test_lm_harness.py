"""Tasks of lm-eval: a choice and a generation on the tiny model, where lm-eval is installed; refusals everywhere."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drpo.model import loading
from support.hostile import refused, said

CHOICE = """\
task: choose_letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: [" a", " b", " cc"]
target_delimiter: ""
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GENERATION = """\
task: say_letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = ["one", "two", "three", "four", "five", "six"]


def best_choice(question: str) -> int:
    """By the sum of log-probabilities of a plain forward pass."""
    model, tokenizer = loading.tiny()
    sums = []
    for choice in (" a", " b", " cc"):
        ids = torch.tensor(tokenizer(question + choice)["input_ids"])
        n = len(tokenizer(choice)["input_ids"])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids[None]).logits[0], -1)[:-1]
        sums.append(float(logp.gather(1, ids[1:, None])[-n:].sum()))
    return sums.index(max(sums))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'drpo[lm-eval]'"
)
def test_a_task_of_the_harness_is_scored_as_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    golds = [best_choice(q) for q in QUESTIONS[:4]]
    golds[0] = (golds[0] + 1) % 3  # one is wrong
    rows = [{"q": q, "gold": g} for q, g in zip(QUESTIONS, [*golds, 0, 0], strict=True)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tasks").mkdir()
    for name, text in (("choice", CHOICE), ("generation", GENERATION)):
        Path("tasks", f"{name}.yaml").write_text(text.format(file=tmp_path / "rows.jsonl"))
    own = ["--lm-eval-folder", "tasks", "--problems", "4", "--precision", "fp32"]
    status, out, err = said(["eval", "tiny", "--lm-eval", "choose_letters", *own, "--json"])
    assert status == 0, err
    assert json.loads(out)["results"]["choose_letters"]["acc,none"] == 0.75
    status, out, err = said(["eval", "tiny", "--lm-eval", "choose_letters", "say_letters", *own])
    assert status == 0 and "0.7500" in out and "say_letters" in out and "the first 4 of 6" in out, (out, err)
    assert "did you mean 'choose_letters'" in refused(["eval", "tiny", "--lm-eval", "choose_leters", *own])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--lm-eval", "t", "--task", "gsm8k"], "--task: tasks of lm-eval have this themselves"),
        (["--lm-eval", "t", "--sampling.temperature", "0"], "--sampling: tasks of lm-eval"),
        (["--lm-eval", "t", "--precision", "int8"], "--precision int8"),
        (["--lm-eval-chat"], "--lm-eval is missing"),
        (["--lm-eval", "t"], "lm_eval is not installed; run pip install 'drpo[lm-eval]'"),
        (["--lm-eval", "t", "--inspect", "t"], "--lm-eval and --inspect are two harnesses"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: list[str], told: str, monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # no such module
    assert told in refused(["eval", "tiny", *arguments])
