"""The head by cut-cross-entropy; its kernels need CUDA."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from cut_cross_entropy import linear_cross_entropy

from benchmarks.workers.head_inputs import Inputs, repeated
from benchmarks.workers.protocol import Record, Repetition, serve


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Nothing to load."""

    def work(x: Inputs) -> None:
        logp = -linear_cross_entropy(x.hidden, x.weight, x.target, reduction="none")
        (-(logp.float() - x.behavior_logp).exp() * x.advantage).mean().backward()

    return {"settings": f"cut-cross-entropy {version('cut-cross-entropy')}"}, repeated({"cce": work})


if __name__ == "__main__":
    serve(prepare)
