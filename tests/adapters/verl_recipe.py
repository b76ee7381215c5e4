"""The recipes of cluster/verl, composed by hydra."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

CLUSTER = Path(__file__).resolve().parents[2] / "cluster" / "verl"


def recipe(setting: str, *overrides: str) -> DictConfig:
    always = (f"here={CLUSTER}", "trainer.experiment_name=test", "hydra.searchpath=[pkg://verl.trainer.config]")
    with initialize_config_dir(str(CLUSTER / "config"), version_base=None):
        return compose(setting, overrides=[*always, *overrides])
