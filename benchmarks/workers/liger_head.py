"""The head by Liger's fused linear GRPO loss, in the form that is plain torch and runs anywhere."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

from benchmarks.workers.head_inputs import Inputs, repeated
from benchmarks.workers.protocol import Record, Repetition, serve


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Make the loss; rows of tokens are completions, and all of them are one chunk."""
    losses: dict[int, LigerFusedLinearGRPOLoss] = {}

    def work(x: Inputs) -> None:
        # Its loop over rows adds [V, H] to the weight's gradient each time; it splits a chunk into blocks of 2,048
        # tokens by 4,096 words anyway, so one chunk of all rows is the fastest and holds no more memory.
        loss = losses.setdefault(
            x.rows, LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, chunk_size=x.rows, compiled=False)
        )
        shape = (x.rows, -1)
        value, _ = loss(
            x.hidden.view(*shape, x.hidden.shape[-1]),
            x.weight,
            x.target.view(shape),
            torch.ones_like(x.target).view(shape),
            x.advantage.view(shape)[:, 0],
            old_per_token_logps=x.behavior_logp.view(shape),
        )
        value.backward()

    about = f"liger-kernel {version('liger-kernel')}; beta 0, all rows in one chunk, not compiled"
    return {"settings": about}, repeated({"liger": work})


if __name__ == "__main__":
    serve(prepare)
