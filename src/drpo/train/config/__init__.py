"""The configuration of a run: `Run` holds ten groups of fields; `configure` changes fields by the names of options.

Objects (task, reward, objective, advantage, critic, reduction, optimisers, schedule) are written as specs:
`drpo(0.2)`, `module:name(1)`.
"""

from drpo.train.config.groups import (
    ENGINES,
    MOST_COMPLETIONS,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    FaultConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardsConfig,
    RolloutConfig,
    TrainerConfig,
)
from drpo.train.config.run import Run, arithmetic, configure, episode_tokens, learning_rate, trains_little, value_of
from drpo.train.config.saved import REGISTRIES, flat_json, from_json, kind_of, load_run, read_value, to_json

__all__ = [
    "ENGINES",
    "MOST_COMPLETIONS",
    "REGISTRIES",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "FaultConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RewardsConfig",
    "RolloutConfig",
    "Run",
    "TrainerConfig",
    "arithmetic",
    "configure",
    "episode_tokens",
    "flat_json",
    "from_json",
    "kind_of",
    "learning_rate",
    "load_run",
    "read_value",
    "to_json",
    "trains_little",
    "value_of",
]
