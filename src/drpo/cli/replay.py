"""`drpo replay`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from drpo import objectives as known
from drpo.cli.options import parse
from drpo.cli.output import PICTURES, require_file
from drpo.errors import InputError
from drpo.files import write_text
from drpo.lab.replay import recorded
from drpo.lab.replay import replay as replayed
from drpo.report.payload import finite
from drpo.report.replay import Decode, draw_replay, replay_sheets
from drpo.report.sheet import print_sheet
from drpo.terminal import Terminal
from drpo.train.session import MODEL


@dataclass(frozen=True)
class ReplayOptions:
    """Ask other objectives what they would have done with a batch that a run has trained on.

    A run's rollouts.jsonl keeps every token with both log-probabilities and its advantage: all that an objective sees.
    So each can be asked, on the same tokens, how it would have weighted them: who is silenced or pulled back, to which
    mu the gradient goes, at which tokens two objectives part, and how far their gradients point the same way. They
    differ at the later updates of a step; on fresh samples nearly all agree. Nothing is trained.

      drpo replay runs/demo --objectives 'drpo(0.2)' 'ppo(0.2,0.28)' 'dppo(0.15)' --step 8 --json replay.json

    Args:
        run: folder of a run that has trained.
        objectives: as spelled: 'drpo(0.2)' 'ppo(0.2,0.28)' ...; the first is compared with each of the others.
        step: counted from 1; default: the last that trained anything.
        json: also write all figures to this file.
        out: the picture, a PNG, SVG or PDF by its ending.
    """

    run: tyro.conf.Positional[Path]
    objectives: tuple[str, ...] = ("drpo(0.2)", "dppo(0.15)", "ppo(0.2,0.28)", "spo(0.2)", "none")
    step: int | None = None
    json: Path | None = None
    out: Path = Path("replay.png")


def replay(arguments: list[str]) -> int:
    """`drpo replay RUN [--objectives ...]`."""
    if not arguments:
        raise InputError("replay: name the folder of a run first")
    options = parse(ReplayOptions, arguments, "drpo replay")
    asked = [known.parse(text) for text in options.objectives]
    require_file("--out", options.out, PICTURES)
    if options.json is not None:
        require_file("--json", options.json)
    batch = recorded(options.run, options.step)
    found = replayed(batch, asked)
    console = Terminal()
    trained = f", trained with {found.trained_with}" if found.trained_with else ""
    updates = "1 update" if found.updates == 1 else f"{found.updates} updates"
    console.print(f"{found.run}, step {found.step}: {found.tokens:,} tokens of {updates}{trained}\n")
    for sheet in replay_sheets(found, batch, _decoder(options.run / MODEL)):
        print_sheet(console, sheet, right=range(1, len(sheet.head)))
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
