"""The command: `python -m benchmarks`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import machine
from benchmarks.cases import OURS, Case
from benchmarks.command import Parser, status
from benchmarks.environments import PEERS, python_of
from benchmarks.parts import PARTS, Scale
from benchmarks.results import FOLDER, Results
from benchmarks.rounds import measure
from benchmarks.table import headline
from benchmarks.worker_pool import WorkerPool
from drpo.errors import InputError, nearest
from drpo.model.device import choose_device
from drpo.model.precision import has_fast_bf16

DESCRIPTION = """Measure drpo side by side with what it is compared with, on this machine.

parts:
  step     one training step whole, against TRL's GRPOTrainer, phase by phase, and against the floor
  rollout  tokens per second, against transformers' generate and vLLM
  head     the loss from hidden states, against autograd, Liger's GRPO loss and cut-cross-entropy (CUDA)
  head_parts  what a bias, a scale and a soft cap of the head cost
  head_objectives  the fused head with objectives of sequences and of the batch, against one of tokens
  growth   how one update grows as tokens, group, prompt, response and vocabulary double
  mismatch how far the sampler's probabilities are from the trainer's, by precision
  overlap  what sampling in the background gains
  neighbours  what a step costs while another program keeps a core busy
  turns    what the later turns of an episode cost, against one long turn
  resampling  groups with a signal, and the time of each, with --dynamic-sampling and without
  checkpointing  what an update costs and saves where layers are computed again
  edges    quick rewards, the report and the resuming of a long run, a comparison of tiny trials

Each peer is installed into .bench/PEER on first use. Every competitor loads its model once and they take turns, round
by round, so that a machine that drifts meets all alike. One that cannot take part stands in the table with the reason.
Results are written after each case; what earlier runs measured stays until it is measured again."""

EXAMPLES = """try:
  python -m benchmarks --quick                      everything once, tiny: does it work here?
  python -m benchmarks --only head --peers none     this project and plain torch alone
  python -m benchmarks --only step,rollout --repeats 9
  python -m benchmarks --only head --match "bf16, V 49,152, H 576, T 2,048"     one case"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; None takes the process's own.

    Returns:
        The exit status: 0 done, 2 bad input, 130 interrupted.
    """
    return status("benchmarks", lambda: _run(_parsed(argv)), "; what was measured is in the results")


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help="parts, with commas; default all")
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--peers", default=",".join(PEERS), help="peers, with commas, or none; default all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 2 rounds; the figures mean nothing")
    parser.add_argument("--repeats", type=int, default=None, help="rounds of each case; default 5, quick 2")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; default benchmarks/results/MACHINE.json")
    arguments = parser.parse_args(argv)
    arguments.only = _chosen("only", arguments.only, list(PARTS))
    arguments.peers = [] if arguments.peers == "none" else _chosen("peers", arguments.peers, list(PEERS))
    if arguments.repeats is not None and arguments.repeats < 1:
        raise InputError(f"repeats={arguments.repeats}: must be at least 1")
    if arguments.out is not None and arguments.out.suffix != ".json":
        raise InputError(f"out={arguments.out}: must end in .json; the table goes beside it")
    return arguments


def _chosen(option: str, text: str, known: Sequence[str]) -> list[str]:
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    for word in wanted:
        if word not in known:
            raise InputError(f"{option}={word!r}{nearest(word, known)}")
    if not wanted:
        raise InputError(f"{option}={text!r}: names nothing; known: {', '.join(known)}")
    return wanted


def _run(arguments: argparse.Namespace) -> int:
    here = machine.describe()
    scale = Scale(
        quick=arguments.quick,
        repeats=arguments.repeats or (2 if arguments.quick else 5),
        cuda=here["accelerator"] is not None,
        memory_bytes=machine.memory_bytes(),
        fast_bf16=has_fast_bf16(choose_device()),
    )
    name = machine.name(here) + ("-quick" if scale.quick else "")
    results = Results(arguments.out or FOLDER / f"{name}.json", here)
    cases = [case for part in arguments.only for case in PARTS[part](scale) if arguments.match in case.name]
    if not cases:
        names = "; ".join(case.name for part in arguments.only for case in PARTS[part](scale))
        raise InputError(f"match={arguments.match!r}: no case's name contains it; there are: {names}")
    console = Console(stderr=True)
    with _progress(console) as progress:
        task = progress.add_task("", total=len(cases))

        def watch(text: str) -> None:
            progress.update(task, description=text)

        pythons = {peer: _python(peer, arguments.peers, watch) for peer in _needed(cases)}
        with WorkerPool({OURS: Path(sys.executable), **pythons}, threads=machine.cores()) as pool:
            for case in cases:
                record = measure(case, pool, scale.repeats, watch)
                results.add(record)
                progress.console.print(headline(record), markup=False, highlight=False)
                progress.advance(task)
    console.print(f"written: {os.path.relpath(results.path)}, {os.path.relpath(results.path.with_suffix('.md'))}")
    return 0


def _needed(cases: Sequence[Case]) -> list[str]:
    """The peers that these cases ask for, in order."""
    return list(dict.fromkeys(e.worker.environment for c in cases for e in c.entrants if e.worker.environment != OURS))


def _python(peer: str, wanted: Sequence[str], watch: Callable[[str], None]) -> Path | str:
    return python_of(peer, watch) if peer in wanted else "skipped: not among --peers"


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
