"""Mistakes in what the adapters of other frameworks share."""

from typing import Any

from planted import Bug, Replacement

T = "tests/adapters/test_weighing.py::"
FILE = "adapters/weighing.py"
GRADIENT = f"{T}test_reweighted_surrogate_has_the_objectives_gradient"
PADDING = f"{T}test_what_stands_in_padding_has_no_effect"

BUGS = (
    Bug(
        1,
        "the advantage is not divided by the ratio that the framework multiplies with",
        FILE,
        "weighed = -gradient(objective, tokens) / torch.exp(log_ratio)",
        "weighed = -gradient(objective, tokens)",
        (GRADIENT,),
    ),
    Bug(
        4,
        "padding of the sampler is read as probabilities of 1",
        FILE,
        '"shift_mean": moved.sum() / n_kept,',
        '"shift_mean": (tokens.logp.exp() - behavior_logp.reshape(-1).exp()).abs().sum() / n_kept,',
        (PADDING, f"{T}test_figures_count_kept_tokens_alone"),
    ),
    Bug(
        9,
        "all rows are one sequence",
        FILE,
        "rows = torch.arange(len(logp), device=logp.device).unsqueeze(1) if logp.dim() == 2 else keep.new_zeros(())",
        "rows = keep.new_zeros(())",
        (f"{GRADIENT}[gspo(0.2, 0.3)]",),
    ),
    Bug(
        9,
        "an advantage per row is laid along the row",
        FILE,
        "column = advantage.unsqueeze(1) if logp.dim() == 2 and advantage.dim() == 1 else advantage",
        "column = advantage",
        (f"{T}test_advantages_by_row_by_column_and_by_token_are_the_same",),
    ),
)


def _multiplied(right: Any) -> Any:
    def ask(objective: Any, tokens: Any) -> Any:
        from drpo.types import TokenLoss

        return TokenLoss(objective(tokens).loss * tokens.keep)

    return ask


def _unscored_as_it_is(right: Any) -> Any:
    return lambda logp, behavior_logp, keep: behavior_logp.where(keep.bool(), logp.detach())


REPLACEMENTS = (
    Replacement(
        "the loss is multiplied by the mask",
        "drpo.adapters.weighing:ask",
        _multiplied,
        (f"{PADDING}[nan-drpo(0.2)]",),
    ),
    Replacement(
        "a token that the sampler could not score is trained with NaN",
        "drpo.adapters.weighing:behavior_or_policy",
        _unscored_as_it_is,
        (f"{T}test_a_token_that_the_sampler_could_not_score_is_taken_as_on_policy",),
    ),
)
