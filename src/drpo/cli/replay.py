"""Other objectives on a recorded batch: the work of `drpo replay`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from drpo import objectives as known
from drpo.cli.commands.replay import ReplayOptions
from drpo.files import write_text
from drpo.lab.replay import recorded
from drpo.lab.replay import replay as replayed
from drpo.report.payload import finite
from drpo.report.replay import Decode, draw_replay, replay_sheets
from drpo.spec import parse_spec
from drpo.terminal import Terminal, as_table
from drpo.train.records import MODEL, refuse_old_run


def replay(options: ReplayOptions) -> int:
    """Ask other objectives what they would have done with a batch that a run has trained on."""
    asked = [parse_spec(text, known.REGISTRY) for text in options.objectives]
    refuse_old_run(options.run)
    batch = recorded(options.run, options.step)
    found = replayed(batch, asked)
    console = Terminal()
    trained = f", trained with {found.trained_with}" if found.trained_with else ""
    updates = "1 update" if found.updates == 1 else f"{found.updates} updates"
    console.print(f"{found.run}, step {found.step}: {found.tokens:,} tokens of {updates}{trained}\n")
    for sheet in replay_sheets(found, batch, _decoder(options.run / MODEL)):
        console.print(as_table(sheet), "")
    draw_replay(found, batch, asked, options.out)
    console.print(f"drawn to {options.out}")
    if options.json is not None:
        write_text(options.json, json.dumps(finite(asdict(found)), indent=1) + "\n")
        console.print(f"written to {options.json}")
    return 0


def _decoder(model: Path) -> Decode | None:
    """What turns ids into text, where the run has left its tokenizer."""
    transformers_logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    except Exception:  # none is there, or not one that can be read: ids do
        return None

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids)))

    return decode
