"""Without a library, its tasks say how to install it."""

from importlib.util import find_spec

import pytest

from drpo.errors import InputError
from drpo.spec import parse_spec
from drpo.tasks import REGISTRY

TASKS = {
    "gem": "gem('game:GuessTheNumber-v0-easy')",
    "textarena": "textarena('GuessTheNumber-v0')",
    "skyrl_gym": "skyrl_gym('gsm8k', 'addition')",
    "openenv": "openenv('envs.shop:Shop')",
    "verifiers": "verifiers('shop:Shop')",
}


@pytest.mark.parametrize("library", [name for name in TASKS if find_spec(name) is None])
def test_a_missing_library_is_named_with_the_command_that_installs_it(library: str) -> None:
    with pytest.raises(InputError, match=f"needs .*: No module named '{library}'; run pip install ") as raised:
        parse_spec(TASKS[library], REGISTRY)
    assert "\n" not in str(raised.value)
