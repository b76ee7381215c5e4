"""The table of families in docs/models.md: its rows as they stand there, and each cell as it is found here.

`PYTHONPATH=tests python -m support.family_table` writes it anew, or only the rows of the families named behind; the
column of vLLM stays as it is, and is written by `support.family_vllm`.
"""

import copy
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from drpo.errors import InputError
from drpo.model import loading
from drpo.model.activations import checkpoint_activations
from drpo.model.policy import Policy
from drpo.model.precision import FP32
from drpo.model.saving import require_savable
from drpo.train.loop import train
from drpo.train.optim import AdamW
from drpo.train.records import METRICS, read_records
from support.families import FAMILIES, build, stir_adapters, stirred, widest
from support.rollouts import transformers_engine
from support.runs import CopiesAt, assert_same_run
from support.tiny_world import batched, completion, grouped, how
from support.updates import equal, gradients
from support.worlds import Letters, sampling, tiny_run

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
COLUMNS = ("family", "class", "trainer", "sampler", "LoRA", "checkpointing", "resume", "vLLM")
TOLERANCE = 1e-4
"""Nats between any two of the trainer, plain transformers, the sampler and the folder read back."""

Row = Mapping[str, str]
"""Column -> cell."""

SAMPLED = [
    completion(range(60 + 9 * i, 70 + 11 * i), prompt_ids=PROMPT, problem=f"p{i // 2}", sample=i % 2)
    for i, PROMPT in enumerate([(5, 6, 7), (5, 6, 7), (9, 8, 7, 6, 4), (9, 8, 7, 6, 4)])
]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def documented() -> dict[str, Row]:
    """The table's rows, by family."""
    lines = DOCUMENT.read_text().splitlines()
    rows = [
        dict(zip(COLUMNS, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        for line in lines[lines.index(_line(COLUMNS)) + 2 :]
    ]
    return {row["family"]: row for row in rows}


def trains(row: Row) -> bool:
    """Whether a row is of a family that is not refused."""
    return not row["trainer"].startswith("refused")


def write(rows: Mapping[str, Row]) -> None:
    """Put rows into the document, in the order of `FAMILIES`; others stay."""
    text, stand = DOCUMENT.read_text(), documented()
    begin = re.search(r"^\| family \|", text, re.MULTILINE)
    assert begin is not None
    cells = {f: {c: "" for c in COLUMNS} | stand.get(f, {}) | rows.get(f, {}) for f in FAMILIES}
    lines = [_line(COLUMNS), f"|{'---|' * len(COLUMNS)}", *(_line([*row.values()]) for row in cells.values())]
    DOCUMENT.write_text(text[: begin.start()] + "\n".join(lines) + "\n")


def one_function(family: str) -> Row:
    """Sample, train on, save and read back one family, with adapters too: how it is run, and whether all agree."""
    model, (_, tokenizer) = build(family), loading.tiny()
    row = {"family": family, "class": f"`{type(model).__name__}`"}
    nothing = dict.fromkeys(("sampler", "LoRA"), "")
    try:
        require_savable(model, tokenizer)
        engine = transformers_engine(model, tokenizer)
        policy = Policy(stirred(copy.deepcopy(model), 0.05), precision=FP32, temperature=1.0)
        gap = widest(policy, engine, tokenizer)
    except InputError as error:
        return row | {"trainer": f"refused: {_said(error)}"} | nothing
    row |= {"trainer": "packed" if policy.shares_prompts else "padded", "sampler": engine.way.value, "LoRA": "yes"}
    try:
        adapted = Policy(copy.deepcopy(model), precision=FP32, temperature=1.0, lora_rank=2)
    except InputError as error:
        return row | {"LoRA": _said(error)}
    stir_adapters(adapted)
    gap = max(gap, widest(adapted, engine, tokenizer))
    assert gap < TOLERANCE, (family, gap)
    return row


def _said(error: InputError) -> str:
    """Without figures, which may differ by processor."""
    return re.sub(r"[\d.]+e-\d+", "...", str(error)).replace("|", "/")


def checkpointing(family: str) -> str:
    """Whether gradients stay the same, to the bit, where layers are computed again in the backward pass."""
    kept, again = (Policy(build(family), precision=FP32, temperature=1.0) for _ in range(2))
    try:
        checkpoint_activations(again.model)
    except InputError:
        return "no"
    (batch,) = batched(grouped(SAMPLED, ((1.0, 0.0), (0.0, 1.0))), how(share_prompts=kept.shares_prompts))
    (expected, _), (found, _) = gradients(kept, batch), gradients(again, batch)
    assert any(gradient.any() for gradient in expected.values()), family
    return "equal" if equal(found, expected) else "differs"


def resume(family: str, folder: Path) -> str:
    """Whether a run that goes on from what a kill left is the whole run, bit for bit: records, weights, optimiser."""
    model = folder / "model"
    build(family).save_pretrained(model)
    loading.tiny()[1].save_pretrained(model)
    sampled = sampling(samples=4, max_new_tokens=12)
    run = tiny_run(
        model=str(model),
        task=Letters("codes"),
        steps=2,
        prompts=4,
        sampling=sampled,
        checkpoint_every=1,
        eval_problems=2,
        optimizer=AdamW(1e-3),
    )
    train(run, folder / "whole", CopiesAt(2, folder / "whole", folder / "killed"))
    assert all(record["grad_norm"] > 0 for record in read_records(folder / "whole" / METRICS))
    train(run, folder / "killed")
    assert_same_run(folder / "whole", folder / "killed")
    return "yes"


def found(family: str) -> Row:
    """All that is found here of one family."""
    row = one_function(family)
    if not trains(row):
        return row | {"checkpointing": "", "resume": ""}
    with tempfile.TemporaryDirectory() as folder:
        return row | {"checkpointing": checkpointing(family), "resume": resume(family, Path(folder))}


if __name__ == "__main__":
    for name in sys.argv[1:] or FAMILIES:
        write({name: found(name)})
        print(_line([*documented()[name].values()]), flush=True)
