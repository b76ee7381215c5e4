"""Tasks: sources of problems to train and to evaluate on."""

from drpo.spec import Registry
from drpo.tasks.addition import Addition
from drpo.tasks.known import AIME, AIME24, AIME25, AMC23, GSM8K, DapoMath, Known, Math500
from drpo.tasks.reasoning_gym import ReasoningGym
from drpo.tasks.records import Records
from drpo.tasks.task import FiniteTask, Task, is_finite
from drpo.tasks.unseen import sample_unseen, training_pool

REGISTRY: Registry[Task] = Registry(
    "task",
    {
        "addition": Addition,
        "reasoning_gym": ReasoningGym,
        "records": Records,
        "gsm8k": GSM8K,
        "math500": Math500,
        "aime": AIME,
        "aime24": AIME24,
        "aime25": AIME25,
        "amc23": AMC23,
        "dapo_math": DapoMath,
        # Solved in several turns; the room of environments builds on this one.
        "calculator": "drpo.environments.calculator:Calculator",
        "guess": "drpo.environments.games:Guess",
        "walk": "drpo.environments.games:Walk",
        "word_game": "drpo.environments.games:WordGame",
        "lookup": "drpo.environments.lookup:Lookup",
        "repair": "drpo.environments.repair:Repair",
        # Environments of other libraries, which are optional.
        "gem": "drpo.environments.libraries.gem:Gem",
        "textarena": "drpo.environments.libraries.textarena:TextArena",
        "skyrl_gym": "drpo.environments.libraries.skyrl_gym:SkyrlGym",
        "trl_environment": "drpo.environments.libraries.trl:TrlEnvironment",
        "openenv": "drpo.environments.libraries.openenv:OpenEnv",
        "verifiers": "drpo.environments.libraries.verifiers:Verifiers",
    },
)

__all__ = [
    "AIME",
    "AIME24",
    "AIME25",
    "AMC23",
    "GSM8K",
    "REGISTRY",
    "Addition",
    "DapoMath",
    "FiniteTask",
    "Known",
    "Math500",
    "ReasoningGym",
    "Records",
    "Task",
    "is_finite",
    "sample_unseen",
    "training_pool",
]
