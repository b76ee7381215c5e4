"""Mistakes in the training step that leave every part right by itself: only a whole run by hand shows them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from planted import Replacement

BY_HAND = ("tests/test_end_to_end.py::test_a_run_is_what_the_formulas_say",)
RESUMED = ("tests/test_end_to_end.py::test_a_resumed_run_draws_the_random_numbers_that_it_would_have_drawn",)

Function = Callable[..., Any]


def _averaged(right: Function) -> Function:
    """The terms weigh 1/T in a micro-batch of T tokens; the objective's part stays what it was."""

    def loss(terms: Any, policy: Any, micro: Any, objective: Any) -> Any:
        import torch

        evenly = replace(micro, weight=torch.full_like(micro.weight, 1 / len(micro.weight)))
        found = policy.loss(micro, objective)
        extra = right(terms, policy, evenly, objective).loss - policy.loss(evenly, objective).loss
        return replace(found, loss=found.loss + extra)

    return loss


def _at_temperature_1(right: Function) -> Function:
    def init(terms: Any, reference: Any, *rest: Any) -> None:
        right(terms, reference, *rest)
        if reference is not None:
            reference.temperature = 1.0

    return init


def _decays_all(right: Function) -> Function:
    def make(spec: Any, *parameters: Any) -> Any:
        optimizer = right(spec, *parameters)
        for group in optimizer.param_groups:
            group["weight_decay"] = spec.weight_decay
        return optimizer

    return make


def _forgets_the_generator(right: Function) -> Function:
    def restore(*arguments: Any, **named: Any) -> Any:
        import torch

        before = torch.get_rng_state()
        progress = right(*arguments, **named)
        torch.set_rng_state(before)
        return progress

    return restore


REPLACEMENTS = (
    Replacement(
        "the KL to the reference has the wrong sign",
        "drpo.objectives.terms:reference_kl",
        lambda right: lambda *arguments, **named: -right(*arguments, **named),
        BY_HAND,
    ),
    Replacement(
        "the entropy bonus has the wrong sign",
        "drpo.objectives.terms:entropy_bonus",
        lambda right: lambda entropy, coefficient: -right(entropy, coefficient),
        BY_HAND,
    ),
    Replacement(
        "the KL to the reference is anchored to pi, not to mu",
        "drpo.objectives.terms:reference_kl",
        lambda right: lambda logp, reference, mu, *rest: right(logp, reference, logp.detach(), *rest),
        BY_HAND,
    ),
    Replacement(
        "the additive terms are averaged over the micro-batch",
        "drpo.train.auxiliary:AuxiliaryLosses.loss",
        _averaged,
        BY_HAND,
    ),
    Replacement(
        "the reference is asked at temperature 1",
        "drpo.train.auxiliary:AuxiliaryLosses.__init__",
        _at_temperature_1,
        BY_HAND,
    ),
    Replacement(
        "Adam's betas are swapped",
        "drpo.train.optim:AdamW.build",
        lambda right: lambda spec, *rest: right(replace(spec, betas=spec.betas[::-1]), *rest),
        BY_HAND,
    ),
    Replacement(
        "weight decay reaches norms",
        "drpo.train.optim:AdamW.build",
        _decays_all,
        BY_HAND,
    ),
    Replacement(
        "a resumed run forgets the global generator",
        "drpo.train.checkpoint:restore",
        _forgets_the_generator,
        RESUMED,
    ),
)
