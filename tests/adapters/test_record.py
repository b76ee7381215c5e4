"""The record that the loss ran: with which objective, on how many tokens; and what a step without it is told."""

import re

import pytest

from adapters.cases import rows
from drpo import objectives
from drpo.adapters import LossRecord, figures, require_ran
from drpo.adapters.weighing import loss_tokens_key
from drpo.errors import InputError
from drpo.objectives import DRPO, Tokens
from drpo.spec import parse_spec
from drpo.types import TokenLoss


def test_figures_say_on_how_many_tokens_and_with_what():
    batch = rows(0)
    for spec, name in (("drpo(0.2)", "drpo_0.2"), ("ppo(0.2, 0.28)", "ppo_0.2_0.28"), ("none", "none")):
        seen = figures(
            parse_spec(spec, objectives.REGISTRY), batch.logp, batch.behavior_logp, batch.advantage, batch.keep
        )
        assert seen[f"loss_tokens/{name}"] == batch.keep.sum()


@pytest.mark.parametrize("spec", ["drpo(0.2, advantage_weighted=False)", "drpo(0.2)*reject('seq_mean_k3', 0.05)"])
def test_every_objective_has_a_name_that_every_logger_takes(spec: str):
    """MLflow takes letters, digits, dots, dashes, blanks and slashes alone."""
    assert re.fullmatch(r"loss_tokens/[\w.-]+", loss_tokens_key(parse_spec(spec, objectives.REGISTRY)))


def test_an_objective_of_ones_own_has_its_class_name():
    class Own:
        tokenwise, needs = True, frozenset()

        def __call__(self, tokens: Tokens) -> TokenLoss:
            return TokenLoss(-tokens.logp)

    assert loss_tokens_key(Own()) == "loss_tokens/Own"


def test_a_record_is_taken_once():
    batch, made = rows(0), LossRecord(DRPO(0.2))
    made.note(batch.logp, batch.behavior_logp, batch.advantage, batch.keep)
    assert made.take("the framework")["loss_tokens/drpo_0.2"] == batch.keep.sum()
    with pytest.raises(InputError, match=r"^the framework: the loss of drpo_0.2 did not run in this step$"):
        made.take("the framework")


def test_metrics_are_asked_with_any_prefix():
    for prefix in ("", "drpo/", "actor/drpo/", "train/drpo/"):
        require_ran([f"{prefix}loss_tokens/drpo_0.2", "loss"], DRPO(0.2))


def test_metrics_of_another_loss_or_another_objective_are_refused():
    with pytest.raises(
        InputError, match=r"have no drpo/loss_tokens/drpo_0.2: the framework trained with a loss of its own"
    ):
        require_ran({"loss": 1.0}, DRPO(0.2))
    with pytest.raises(InputError, match=r"^the step trained with drpo_0.25, not with drpo_0.2$"):
        require_ran({"drpo/loss_tokens/drpo_0.25": 8.0}, DRPO(0.2))
