"""The implementation of `drpo replay`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from drpo.cli.commands.replay import ReplayOptions
from drpo.files import write_text
from drpo.lab.replay import recorded
from drpo.lab.replay import replay as replayed
from drpo.methods import parse_objective
from drpo.report.payload import finite
from drpo.report.replay import Decode, draw_replay, replay_sheets
from drpo.terminal import Terminal, as_table
from drpo.train.records import MODEL, refuse_old_run


def replay(options: ReplayOptions, out: Path) -> int:
    """Show what other objectives would have done with a batch of a run.

    Args:
        options: the options.
        out: the picture.
    """
    asked = [parse_objective(text) for text in options.objectives]
    refuse_old_run(options.run)
    batch = recorded(options.run, options.step)
    result = replayed(batch, asked)
    console = Terminal()
    trained = f", trained with {result.trained_with}" if result.trained_with else ""
    updates = "1 update" if result.updates == 1 else f"{result.updates} updates"
    console.print(f"{result.run}, step {result.step}: {result.tokens:,} tokens of {updates}{trained}\n")
    for sheet in replay_sheets(result, batch, _decoder(options.run / MODEL)):
        console.print(as_table(sheet), "")
    draw_replay(result, batch, asked, out)
    console.print(f"drawn to {out}")
    if options.json is not None:
        write_text(options.json, json.dumps(finite(asdict(result)), indent=1) + "\n")
        console.print(f"written to {options.json}")
    return 0


def _decoder(model: Path) -> Decode | None:
    """Return a decoder of token ids, if the run has saved its tokenizer."""
    transformers_logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    except Exception:  # missing or unreadable: show ids instead
        return None

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids)))

    return decode
