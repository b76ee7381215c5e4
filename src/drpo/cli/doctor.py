"""The implementation of `drpo doctor`."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from drpo.cli.commands.doctor import DoctorOptions
from drpo.cli.methods import print_method
from drpo.doctor import QUICK, THOROUGH, Finding, Verdict, examine_and_watch
from drpo.terminal import Terminal
from drpo.train.config import Run
from drpo.train.setup import build

STYLES: Mapping[Verdict, str] = {"ok": "green", "note": "yellow", "broken": "bold red"}


def doctor(recipe: str, run: Run, options: DoctorOptions) -> int:
    """Check that a run's numbers are sound on this machine; return 1 if something is broken."""
    transformers_logging.disable_progress_bar()
    console = Terminal(stderr=options.json)
    print_method(console, run, options.method)
    findings: list[Finding] = []
    with console.status(Text(f"looking at {recipe}: {run.model.name}, {run.rollout.engine}")) as waiting:
        components = build(run)
        try:
            for finding in examine_and_watch(run, components, QUICK if options.quick else THOROUGH):
                findings.append(finding)
                waiting.update(f"{len(findings)} checks done")
                if not options.json:
                    print_finding(console, finding)
        finally:
            components.driver.engine.close()
    broken = [f.check for f in findings if f.verdict == "broken"]
    if options.json:
        print(json.dumps({"sound": not broken, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        verdict = f"broken: {', '.join(broken)}" if broken else f"{recipe} is sound on this machine"
        console.print(verdict, style=STYLES["broken" if broken else "ok"])
    return 1 if broken else 0


def print_finding(console: Console, finding: Finding) -> None:
    """Print a finding and its advice, one line each."""
    line = Text(f"{finding.verdict:<6} ", style=STYLES[finding.verdict])
    line.append(f"{finding.check:<12} ", style="bold")
    line.append(f"{finding.figure} (wanted: {finding.budget})", style="default")
    console.print(line, soft_wrap=True)
    if finding.advice:
        console.print(Text(f"       -> {finding.advice}", style=STYLES[finding.verdict]), soft_wrap=True)
