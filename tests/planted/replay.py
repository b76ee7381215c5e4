"""Mistakes in the replay of a recorded batch."""

from planted import Bug

REPLAY = "tests/test_replay.py::"
READING = f"{REPLAY}test_a_reading_is_its_definition"
BATCH = f"{REPLAY}test_the_batch_is_what_was_recorded_less_what_was_not_trained"
DISPUTES = f"{REPLAY}test_cosines_and_disputes"

BUGS = (
    Bug(
        7,
        "mu and pi change places in a replay",
        "lab/replay.py",
        '            column("logp"),\n            column("behavior_logp"),\n',
        '            column("behavior_logp"),\n            column("logp"),\n',
        (BATCH,),
    ),
    Bug(
        12,
        "steps are replayed together",
        "lab/replay.py",
        'chosen = [r for r in trained if r["step"] == (steps[-1] if step is None else step)]',
        "chosen = trained",
        (BATCH,),
    ),
    Bug(
        19,
        "a token of zero advantage counts as silenced",
        "lab/replay.py",
        "silenced=share((w == 0) & (a != 0)),",
        "silenced=share(slope == 0),",
        (READING,),
    ),
    Bug(
        19,
        "mass is counted without the ratio",
        "lab/replay.py",
        "(tokens.advantage * r).abs(), tokens.advantage",
        "tokens.advantage.abs(), tokens.advantage",
        (READING,),
    ),
    Bug(
        19,
        "the least disputed tokens are shown",
        "lab/replay.py",
        "apart.argsort(descending=True, stable=True)",
        "apart.argsort(stable=True)",
        (DISPUTES,),
    ),
    Bug(
        9,
        "an objective is given another divergence than it reads",
        "lab/replay.py",
        "if needed not in (None, batch.divergence):",
        "if needed is not None and batch.divergence is None:",
        (f"{REPLAY}test_a_divergence_is_read_where_it_was_recorded_and_refused_elsewhere",),
    ),
)
