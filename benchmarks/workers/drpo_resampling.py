"""The first steps of the demo on some sums, with groups of equal rewards sampled again and without."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition, serve
from drpo.recipes.addition import demo
from drpo.rollout import Engine
from drpo.tasks import Addition
from drpo.train.config import configure
from drpo.train.loop import train
from drpo.train.records import METRICS, read_records
from drpo.train.setup import build
from drpo.types import Generation, Request


@dataclass
class Counted:
    """An engine whose sampled tokens are counted, those of attempts that are thrown away too."""

    engine: Engine
    tokens: int = 0

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return what the engine does."""
        generations = self.engine.generate(requests)
        self.tokens += sum(len(g.token_ids) for g in generations)
        return generations

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Note the demo with other sums and sizes; a request has "again", how often, and "steps"; its round is the seed."""
    changes = {"sampling.samples": setup["samples"], "sampling.max_new_tokens": setup["new_tokens"]}
    run = configure(
        demo(),
        model=setup["model"],
        task=Addition(setup["low"], setup["high"]),
        prompts=setup["prompts"],
        updates=2,
        eval_problems=0,
        **changes,
    )
    meter = Meter()

    def repetition(request: Mapping[str, Any]) -> Record:
        mine = configure(run, steps=request["steps"], dynamic_sampling=request["again"], seed=request["round"])
        components = build(mine)
        engine: Any = Counted(components.driver.engine)
        components = replace(components, driver=replace(components.driver, engine=engine))
        with tempfile.TemporaryDirectory() as folder:
            meter.start()
            summary = train(mine, Path(folder), components=components, keep_model=False)
            record = meter.stop()
            steps = read_records(Path(folder) / METRICS)
        groups = mine.data.prompts * len(steps)
        return {
            **record,
            "seconds": summary["training_seconds"],
            "phases": summary["seconds"],
            "groups": groups,
            "sampled_groups": groups + sum(step.get("resampling_attempts", 0) for step in steps),
            "groups_with_signal": round(sum(step["groups_with_signal"] for step in steps) * mine.data.prompts),
            "tokens": engine.tokens,
        }

    return {"settings": "first steps of the demo with these sums"}, repetition


if __name__ == "__main__":
    serve(prepare)
