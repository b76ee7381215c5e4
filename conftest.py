"""Which files pytest leaves alone: adapters of frameworks that this environment does not have."""

from importlib.util import find_spec

FRAMEWORK = {
    "trl": "trl",
    "verl": "verl",
    "skyrl": "skyrl",
    "openrlhf": "openrlhf",
    "slime": "slime",
    "tinker": "tinker",
}
collect_ignore = [f"src/drpo/adapters/{file}.py" for file, module in FRAMEWORK.items() if find_spec(module) is None]
collect_ignore.append("tests/adapters/tinker_server.py")  # a script, for the environment of its tests
