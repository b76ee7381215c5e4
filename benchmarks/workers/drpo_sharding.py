"""Updates of a whole policy and of one divided by FSDP2, in processes that torchrun starts. Standard library only."""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.workers.commands import output_of
from benchmarks.workers.protocol import Record, Repetition, serve

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
PROGRAM = ("-m", "benchmarks.workers.sharded_updates")


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """A request has "processes", "until", by the clock, and what `sharded_updates` wants beside the setup.

    Nothing is run where "until" is None.
    """

    def repetition(request: Mapping[str, Any]) -> Record:
        if request["until"] is None:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "record.json"
            program = (*PROGRAM, json.dumps({**setup, **request}), str(out))
            text, done = output_of((*LAUNCHER, str(request["processes"]), *program), request["until"])
            if not done:
                raise RuntimeError("not done in its time; ended")
            if not out.exists():
                errors = [line for line in text.splitlines() if "Error: " in line]
                raise RuntimeError((errors or text.strip().splitlines() or ["it said nothing"])[0])
            record: Record = json.loads(out.read_text(encoding="utf-8"))
            return {**record, "seconds": record["ways"]["whole"]["seconds"]}

    return {"settings": "drpo(0.2) on made-up completions; torchrun"}, repetition


if __name__ == "__main__":
    serve(prepare)
