"""Mistakes in reading the checkpoints of other trainers."""

from planted import Bug

T = "tests/test_foreign.py::"
FILE = "foreign.py"
PIECES = f"{T}test_pieces_of_fsdp_go_together"

BUGS = (
    Bug(
        19,
        "step 9 is taken for newer than step 20",
        FILE,
        "steps = {int(m[1]): path for",
        "steps = {m[1]: path for",
        (f"{T}test_the_newest_model_of_a_run_is_found",),
    ),
    Bug(
        19,
        "a checkpoint of a stranger may run code",
        FILE,
        'map_location="cpu", weights_only=True)',
        'map_location="cpu", weights_only=False)',
        (f"{T}test_nothing_but_tensors_is_unpickled",),
    ),
    Bug(
        16,
        "pieces are joined along rows, however they were cut",
        FILE,
        "return torch.cat(rows, placements[0].dim) if",
        "return torch.cat(rows, 0) if",
        (PIECES,),
    ),
    Bug(
        16,
        "copies of a piece are joined as if they were parts",
        FILE,
        "if isinstance(placements[0], Shard) else rows[0]",
        "if isinstance(placements[0], Shard) else torch.cat(rows)",
        (PIECES,),
    ),
    Bug(
        16,
        "the pieces of a mesh are joined column by column",
        FILE,
        "rows = [_join(local[i * step : (i + 1) * step],",
        "rows = [_join(local[i :: shape[0]],",
        (PIECES,),
    ),
    Bug(
        20,
        "a piece that is missing goes unnoticed",
        FILE,
        "if found and (len(sizes) > 1 or sorted(found) != list(range(max(sizes)))):",
        "if found and len(sizes) > 1:",
        (f"{T}test_a_missing_piece_is_named",),
    ),
    Bug(
        16,
        "an export of a run's end is the untrained model",
        "cli/export.py",
        "    checkpoint.restore(chosen, policy.checkpointed(), None)\n",
        "",
        (f"{T}test_the_last_checkpoint_exports_what_the_run_exported",),
    ),
)
