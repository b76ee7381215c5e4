"""What a GPU must show, in ten minutes: `python -m benchmarks.gpu_day`."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.command import Parser, status
from benchmarks.parts import head
from benchmarks.parts.scale import Scale
from benchmarks.results import FOLDER, Results
from benchmarks.rounds import Rounds, measure
from benchmarks.table import headline
from benchmarks.worker_pool import WorkerPool, plain
from benchmarks.workers.protocol import one_line
from drpo.errors import InputError, nearest
from drpo.model.device import choose_device
from drpo.model.precision import has_fast_bf16

VOCABULARY, HIDDEN = head.CPU_SHAPES[1]
MINUTES = 10.0
"""What the parts' seconds add up to."""
MARGIN = 3.0
"""Seconds before a part's end at which a worker ends what it has started, before it is ended itself."""
NORM_APART = 0.02
"""How far the norm of the same gradient may be, as a share, where rounding alone differs."""
CHECKS = ("rows", "linear_logprob", "linear_policy_loss")
INSTALLED = {"trl": ("liger_kernel", "liger-kernel"), "cce": ("cut_cross_entropy", "cut-cross-entropy")}
"""Peer's environment -> the module that this Python must have to run it, and the package that has it."""
NOT_OURS = {"log_softmax", *(name for name, (environment, _, _) in head.OPERATORS.items() if environment != OURS)}
"""Entrants whose failure is no fault of drpo's."""

DESCRIPTION = """Check and measure drpo on a GPU, within a limit of time.

parts:
  kernels   the head's Triton kernels and operators against float64, beside plain PyTorch's errors
  head      the head's time and memory at a vocabulary of 151,936, against log_softmax, Liger and cut-cross-entropy
  step      training steps of a random model of Qwen2.5-0.5B's shape, sampled by transformers, and by vLLM
  sharding  updates with FSDP2 on one GPU, and with NCCL on all where there are several, against one whole model
  tests     the tests marked gpu

Peers take part where they are installed beside drpo; nothing is installed or fetched. Results are written after each
case, with the error of what failed. The status is 1 where a check failed or anything of drpo's did."""

EXAMPLES = """try:
  python -m benchmarks.gpu_day                      all parts, in ten minutes
  python -m benchmarks.gpu_day --only head --minutes 3
  python -m benchmarks.gpu_day --device cpu --tiny  the same on a CPU with tiny sizes: does it run?"""


@dataclass(frozen=True)
class Part:
    """Cases with a limit of time.

    Args:
        cases: for a machine, and for the seconds that are left to the part.
        seconds: of `MINUTES`; what a part leaves over goes to those after it.
        rounds: of each case.
    """

    cases: Callable[[Scale, float], list[Case]]
    seconds: float
    rounds: int


def kernels(scale: Scale, seconds: float) -> list[Case]:
    """Return a case for each dtype; the row kernels know float16 too, which nothing trains in."""
    size = (
        {"tokens": 4, "vocabulary": 600, "hidden": 32}
        if scale.quick
        else {"tokens": 256, "vocabulary": VOCABULARY, "hidden": HIDDEN}
    )
    worker = Worker(OURS, "kernels", {})
    cases = []
    for dtype in ("fp32", "bf16", "fp16"):
        request = {**size, "dtype": dtype, "row": 4}
        entrants = tuple(
            Entrant(check, worker, {**request, "check": check}, {"tokens": 4})
            for check in CHECKS
            if dtype != "fp16" or check == "rows"
        )
        cases.append(Case("kernels", f"{dtype}, {_shape(size)}", "rows", entrants, request))
    return cases


def heads(scale: Scale, seconds: float) -> list[Case]:
    """Return the head's cases at the vocabulary of Qwen."""
    if scale.quick:
        return [head.case(scale, *head.QUICK_SHAPES[0], scale.precisions[0], 8)]
    shapes = [("bf16", HIDDEN, 8192), ("bf16", 4096, 8192), ("bf16", HIDDEN, 16_384), ("fp32", HIDDEN, 8192)]
    return [head.case(scale, VOCABULARY, hidden, dtype, tokens) for dtype, hidden, tokens in shapes]


def steps(scale: Scale, seconds: float) -> list[Case]:
    """Return steps whose answers are as long as allowed, since a random model all but never ends one.

    vLLM, which takes long to start, is in a second case, so that the first has its figures whatever becomes of it.
    """
    setup = {
        **_model(scale),
        "reward": "hash",
        "low": 1,
        "high": 50,
        "prompts": 2 if scale.quick else 8,
        "samples": 2 if scale.quick else 8,
        "new_tokens": 4 if scale.quick else 256,
        "learning_rate": 1e-6,
        "micro_batch_tokens": 16_384,
    }
    ours = Entrant("drpo", Worker(OURS, "drpo_step", setup), {})
    vllm = Entrant("drpo, vLLM", Worker(OURS, "drpo_step", {**setup, "engine": "vllm"}), {})
    size = {"size": 64 if scale.quick else 8192, "precision": setup["precision"]}
    rates = Entrant("matrix products", Worker(OURS, "rates", {}), size)
    shape = {name: setup[name] for name in ("prompts", "samples", "new_tokens", "precision", "reward", "model")}
    shape["regime"] = "full"
    name = f"{setup['precision']}, random Qwen2 of {'two layers' if scale.quick else '0.5B'}, full length, hash reward"
    if not find_spec("vllm"):
        skipped = {vllm.name: "skipped: vLLM is not installed beside drpo"}
        return [Case("step", name, ours.name, (ours, rates), shape, skipped)]
    return [
        Case("step", name, ours.name, (ours, rates), shape),
        Case("step", f"{name}, beside vLLM", ours.name, (ours, rates, vllm), shape),
    ]


def sharding(scale: Scale, seconds: float) -> list[Case]:
    """Return one case: the same updates of a whole and of a divided model, by one process and by one for each GPU.

    A CPU has two processes, by gloo.
    """
    several = torch.cuda.device_count() if scale.cuda else 2
    processes = {"1 process": 1, **({f"{several} processes": several} if several > 1 else {})}
    request = {
        "prompts": 4 if scale.quick else 8,
        "samples": 2 if scale.quick else 8,
        "prompt_tokens": 8 if scale.quick else 128,
        "new_tokens": 4 if scale.quick else 256,
        "micro_batch_tokens": 16 if scale.quick else 4096,
        "updates": 2 if scale.quick else 4,
    }
    worker = Worker(OURS, "drpo_sharding", _model(scale))
    shares = [time.time() + (seconds - MARGIN) * (i + 1) / len(processes) for i in range(len(processes))]
    entrants = tuple(
        Entrant(name, worker, {**request, "until": until, "processes": n}, {"until": None})
        for (name, n), until in zip(processes.items(), shares, strict=True)
    )
    skipped = {} if several > 1 else {"several processes": "skipped: one GPU"}
    return [Case("sharding", f"{worker.setup['precision']} updates", "1 process", entrants, request, skipped)]


def tests(scale: Scale, seconds: float) -> list[Case]:
    """Return one case: on a GPU what waits for one; else a few of those that Triton's interpreter runs."""
    request = {
        "paths": ["tests/test_triton.py", *(["tests/test_precision.py"] if scale.cuda else [])],
        "marker": "gpu" if scale.cuda else "interpreted",
        "match": "" if scale.cuda else "test_slope and 3x1 and f32 or test_a_nan and 5x37",
        "until": time.time() + seconds - MARGIN,
    }
    entrant = Entrant("pytest", Worker(OURS, "gpu_tests", {}), request, {"until": None})
    return [Case("tests", f"marked {request['marker']}", "pytest", (entrant,), {})]


PARTS: Mapping[str, Part] = {
    "kernels": Part(kernels, 45, rounds=1),
    "head": Part(heads, 120, rounds=10),
    "step": Part(steps, 210, rounds=3),
    "sharding": Part(sharding, 105, rounds=1),
    "tests": Part(tests, 120, rounds=1),
}


def _model(scale: Scale) -> dict[str, Any]:
    return {"model": f"benchmarks.qwen2:{'tiny' if scale.quick else 'half_billion'}", "precision": scale.precisions[0]}


def _shape(size: Mapping[str, int]) -> str:
    return f"V {size['vocabulary']:,}, H {size['hidden']:,}, T {size['tokens']:,}"


def faults(record: Mapping[str, Any]) -> list[str]:
    """Return what is wrong in a case's record, a line for each; what a peer failed at is not.

    Args:
        record: as `rounds.measure` returns it, of one of this file's parts.

    Example:
        >>> bad = {"passed": 1, "failed": 1, "names": ["test_a"], "done": True}
        >>> faults({"part": "tests", "name": "x", "failures": {}, "rounds": [{"pytest": bad}]})
        ['tests: x: pytest: test_a failed']
    """
    where = f"{record['part']}: {record['name']}: "
    ours = {n: text for n, text in record["failures"].items() if n not in NOT_OURS and not text.startswith("skipped")}
    lines = [f"{name}: {text}" for name, text in ours.items()]
    for answers in record["rounds"]:
        for name, answer in answers.items():
            lines += [f"{name}: {test} failed" for test in answer.get("names", ())]
            lines += [f"{name}: not done in time"] if answer.get("done") is False else []
            lines += [f"{name}: beyond its budget: {answer['errors']}"] if answer.get("within") is False else []
    if record["part"] == "sharding":
        lines += _apart(record["rounds"], record["baseline"])
    return [where + line for line in lines]


def _apart(rounds: Rounds, baseline: str) -> list[str]:
    """Say whose gradients have other norms than those of the whole model in one process."""
    lines = []
    for answers in (r for r in rounds if baseline in r):
        wanted = answers[baseline]["ways"]["whole"]["grad_norms"]
        for name, answer in answers.items():
            for way, record in answer["ways"].items():
                pairs = zip(record["grad_norms"], wanted, strict=True)
                if not all(math.isclose(norm, right, rel_tol=NORM_APART) for norm, right in pairs):
                    lines.append(f"{name}, {way}: gradient norms {record['grad_norms']}, a whole model has {wanted}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; None takes the process's own.

    Returns:
        The exit status: 0 done, 1 a check failed or something of drpo's did, 2 bad input, 130 interrupted.
    """
    return status("gpu_day", lambda: _run(_parsed(argv)), "; what was measured is in the results")


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks.gpu_day",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help="parts, with commas; default all")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together; default 10")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu asks for --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; default benchmarks/results/MACHINE.json")
    arguments = parser.parse_args(argv)
    arguments.only = [part.strip() for part in arguments.only.split(",")]
    for part in arguments.only:
        if part not in PARTS:
            raise InputError(f"only={part!r}{nearest(part, list(PARTS))}")
    if not arguments.minutes > 0:
        raise InputError(f"minutes={arguments.minutes:g}: must be above 0")
    if arguments.device == "cpu" and not arguments.tiny:
        raise InputError("device='cpu': real sizes take a CPU hours; add --tiny to see whether everything runs")
    if arguments.out is not None and arguments.out.suffix != ".json":
        raise InputError(f"out={arguments.out}: must end in .json; the table goes beside it")
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    _prepare(arguments.device)
    here = machine.describe()
    cuda = here["accelerator"] is not None
    scale = Scale(arguments.tiny, 0, cuda, machine.memory_bytes(), has_fast_bf16(choose_device()))
    file = machine.name(here) + ("-gpu-day-quick" if scale.quick else "") + ".json"
    results = Results(arguments.out or FOLDER / file, here)
    wrong: list[str] = []
    allowed = time.monotonic()
    for part in (name for name in PARTS if name in arguments.only):
        allowed += 60 * arguments.minutes * PARTS[part].seconds / sum(PARTS[n].seconds for n in arguments.only)
        for record in _records(part, scale, allowed):
            results.add(record)
            print(headline(record), file=sys.stderr)
            wrong += faults(record)
    print(f"written: {os.path.relpath(results.path)}, {os.path.relpath(results.path.with_suffix('.md'))}")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


def _prepare(device: str) -> None:
    """Show the workers the device that they shall find; raise where it is not there."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on a CPU by it, where triton is installed
    elif not torch.cuda.is_available():
        raise InputError(f"device='cuda': torch {torch.__version__} finds no GPU; --device cpu --tiny rehearses it")


def _records(name: str, scale: Scale, deadline: float) -> Iterator[dict[str, Any]]:
    """Yield the record of each case of a part, measured before the deadline as far as there is time."""
    part = PARTS[name]

    def left() -> float:
        return deadline - time.monotonic()

    try:
        cases = part.cases(scale, left())
        rounds = min(part.rounds, 2) if scale.quick else part.rounds
        with WorkerPool({OURS: Path(sys.executable), **_peers()}, machine.cores(), left) as pool:
            for number, case in enumerate(cases):
                yield measure(case, pool, rounds, lambda text: None, left() / (len(cases) - number))
    except Exception as error:
        yield _failed(name, plain(one_line(error)))


def _failed(part: str, why: str) -> dict[str, Any]:
    """Return the record of a part that failed as a whole."""
    record = {"part": part, "name": "the whole part", "baseline": part, "entrants": [part], "parameters": {}}
    return {**record, "about": {}, "failures": {part: why}, "rounds": [], "when": time.strftime("%Y-%m-%d")}


def _peers() -> dict[str, Path | str]:
    return {
        peer: Path(sys.executable) if find_spec(module) else f"skipped: {package} is not installed beside drpo"
        for peer, (module, package) in INSTALLED.items()
    }


if __name__ == "__main__":
    sys.exit(main())
