"""`python -m drpo.adapters.verl ARGUMENTS` in place of `python -m verl.trainer.main_ppo ARGUMENTS`.

The same trainer on the same arguments, after `drpo.adapters.verl.check` of the whole configuration.
"""

import sys

import hydra
from omegaconf import DictConfig
from verl.trainer import main_ppo

from drpo.adapters.verl import check
from drpo.errors import InputError


def checked(config: DictConfig) -> None:
    """Run verl's trainer on a configuration, or exit with status 2 and one line that says what to set."""
    try:
        check(config)
    except InputError as error:
        print(f"drpo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    main_ppo.main(config)


if __name__ == "__main__":
    hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)(checked)()
