"""What pytest leaves alone: adapters of frameworks that this environment does not have, and their tests' helpers."""

from importlib.util import find_spec

FRAMEWORK = {
    "trl": "trl",
    "trl_async": "trl",
    "verl": "verl",
    "skyrl": "skyrl",
    "openrlhf": "openrlhf",
    "slime": "slime",
    "tinker": "tinker",
    "unsloth": "unsloth",
    "open_instruct": "open_instruct",
    "areal": "areal",
    "swift": "swift",
    "roll": "roll",
    "torchtitan": "monarch",
}
MISSING = [file for file, module in FRAMEWORK.items() if find_spec(module) is None]
collect_ignore = [f"src/drpo/adapters/{file}{end}" for file in MISSING for end in (".py", "")]
if find_spec("verifiers") is None:
    collect_ignore.append("src/drpo/environments/libraries/verifiers_bridge.py")
collect_ignore += [
    f"tests/envs/{file}.py" for file in ("openenv_counter", "verifiers_boxed", "verifiers_riddles", "verifiers_sums")
]  # imported by tests alone
collect_ignore_glob = [f"tests/adapters/{file}_*.py" for file in MISSING]
collect_ignore.append("tests/adapters/tinker_server.py")  # a script, for the environment of its tests
