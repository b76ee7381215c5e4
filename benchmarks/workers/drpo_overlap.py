"""A short run whose rollouts are sampled one step ahead, in turn with training or in the background."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.workers.drpo_step import configuration
from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition, serve
from drpo.rollout import ScriptedEngine
from drpo.train.config import configure
from drpo.train.loop import train
from drpo.train.setup import build
from drpo.types import Generation, Request

WORDS = " and so on" * 8


class Elsewhere(ScriptedEngine):
    """Takes its time without taking any of this machine's: the least that a sampler on other hardware could cost it."""

    seconds = 0.0

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Wait, and return what the script says."""
        time.sleep(self.seconds)
        return super().generate(requests)


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Note the run of `configuration`, with "steps" and "away_s" (None: sample here); a request has "overlap"."""
    run = configure(configuration(setup), steps=setup["steps"], async_steps=1)
    meter = Meter()

    def repetition(request: Mapping[str, Any]) -> Record:
        mine = configure(run, overlap=request["overlap"])
        components = build(mine)
        if setup["away_s"] is not None:
            engine = Elsewhere(components.tokenizer, lambda request: f"{request.key[-2]} {request.key[-1]}{WORDS}")
            engine.seconds = setup["away_s"]
            components = replace(components, driver=replace(components.driver, engine=engine))
        with tempfile.TemporaryDirectory() as folder:
            meter.start()
            summary = train(mine, Path(folder), components=components)
            record = meter.stop()
        # Without loading, checkpoints and exports, which both have alike.
        return {**record, "seconds": summary["training_seconds"], "phases": summary["seconds"]}

    return {"settings": f"one step ahead, {run.trainer.steps} steps"}, repetition


if __name__ == "__main__":
    serve(prepare)
