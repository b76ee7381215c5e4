"""One of two ranks of verl's worker: trains its half of a mini-batch for two steps, and says what it saw.

python tests/adapters/verl_rank.py RANK FOLDER SPEC
"""

import json
import sys
from functools import partial
from pathlib import Path

from adapters import verl_on_cpu as cpu  # before verl, whose platform it chooses

# isort: split
import torch
from verl.utils import tensordict_utils as tu
from verl.workers.utils.losses import ppo_loss

from adapters.test_verl import actor, full, sampled


def main(rank: int, folder: Path, spec: str) -> None:
    """Write losses to FOLDER/RANK.json and, from the first rank, the parameters to FOLDER/parameters.pt."""
    made = cpu.worker(str(folder / "model"), str(folder / "store"), 1e-2, rank, n_ranks=2)
    made.set_loss_fn(partial(ppo_loss, actor(spec, loss_agg_mode="token-mean")))
    prompts, responses, columns = sampled(0)
    mine = slice(2 * rank, 2 * rank + 2)
    half = (prompts[mine], responses[mine], {name: rows[mine] for name, rows in columns.items()})
    losses = []
    for _ in range(2):
        data = cpu.batch_of(*half, temperature=1.0, global_batch_size=4)
        losses.append(tu.get(made.train_batch(data), "metrics")["loss"])
    whole = [full(parameter).detach() for parameter in made.engine.module.parameters()]  # a collective: on both ranks
    if rank == 0:
        torch.save(whole, folder / "parameters.pt")
    (folder / f"{rank}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
