"""Mistakes in the objectives, their divergences and what they are made of."""

from dataclasses import replace
from typing import Any

from planted import Replacement

OBJECTIVES = "tests/test_objectives.py::"
TOPK = "tests/test_topk.py::"

FORMULA = f"{OBJECTIVES}test_loss_gradient_and_weight_are_the_printed_formula"
FINITE_DIFFERENCE = f"{OBJECTIVES}test_gradient_is_the_finite_difference_of_the_loss"
QUADRANT = f"{OBJECTIVES}test_weight_in_each_quadrant_of_advantage_and_ratio"
BOUNDARY = f"{OBJECTIVES}test_drpo_weight_is_zero_on_the_boundary_and_turns_round_beyond"
GOLDEN = f"{OBJECTIVES}test_golden_vectors"
EXTREME = f"{OBJECTIVES}test_extreme_ratios_stay_finite_and_exact_in_float32"
BFLOAT16 = f"{OBJECTIVES}test_bfloat16_inputs_are_widened_before_any_arithmetic"
BINARY_KL = f"{OBJECTIVES}test_binary_kl_at_the_ends_of_the_interval"
REMOVED = f"{OBJECTIVES}test_masked_token_is_a_removed_token"
SPLIT = f"{OBJECTIVES}test_gradient_does_not_depend_on_the_split_or_the_order"
FLOW = f"{OBJECTIVES}test_gradient_flows_only_through_logp_and_inputs_stay_as_they_are"
MERGED = f"{TOPK}test_divergences_are_those_of_the_merged_distributions"
TOPK_GOLDEN = f"{TOPK}test_golden_vectors"


def _flows_everywhere(right: Any) -> Any:
    def token_loss(tokens: Any, value: Any, slope: Any) -> Any:
        from drpo.types import TokenLoss

        return TokenLoss(value + slope.detach() * (tokens.logp - tokens.logp.detach()))

    return token_loss


def _always_spos(right: Any) -> Any:
    def quadratic(tokens: Any, radius: float, power: float, advantage_weighted: bool, penalised: Any) -> Any:
        return right(tokens, radius, 1.0, advantage_weighted, penalised)

    return quadratic


def _inside(right: Any) -> Any:
    def quadratic(tokens: Any, radius: float, power: float, advantage_weighted: bool, penalised: Any) -> Any:
        return right(tokens, radius, power, advantage_weighted, None if penalised is None else ~penalised)

    return quadratic


def _swapped(first: str, second: str) -> Any:
    """A call of an objective two of whose parameters change places."""

    def make(right: Any) -> Any:
        def call(self: Any, tokens: Any) -> Any:
            return right(replace(self, **{first: getattr(self, second), second: getattr(self, first)}), tokens)

        return call

    return make


def _mean_of_its_part(right: Any) -> Any:
    return lambda objective, tokens, weight: right(objective, tokens, weight) / tokens.keep.sum().clamp(min=1)


def _unwidened(right: Any) -> Any:
    return lambda tokens: (tokens.logp, tokens.behavior_logp, tokens.advantage)


def _rounded_log1mexp(right: Any) -> Any:
    return lambda x: (1 - x.exp()).log()


REPLACEMENTS = (
    Replacement(
        "the gradient flows through mu and the advantage too",
        "drpo.objectives.contract:token_loss",
        _flows_everywhere,
        (FLOW,),
    ),
    Replacement(
        "the quadratic penalty pushes outwards",
        "drpo.objectives.quadratic:prob_diff",
        lambda right: lambda tokens, power=0.0: -right(tokens, power),
        (QUADRANT, GOLDEN, BOUNDARY),
    ),
    Replacement(
        "DRPO's radius is a ratio's: every power is SPO's",
        "drpo.objectives.quadratic:_quadratic",
        _always_spos,
        (QUADRANT, GOLDEN, f"{OBJECTIVES}test_drpo_weight_is_bounded"),
    ),
    Replacement(
        "the penalty applies inside the radius instead of outside",
        "drpo.objectives.quadratic:_quadratic",
        _inside,
        (f"{FORMULA}[drpo(0.1,outside=0.15)]", QUADRANT),
    ),
    Replacement(
        "PPO's clip looks at the ratio and not at the advantage's sign",
        "drpo.objectives.clip:_inside",
        lambda right: lambda r, advantage, low, high: (r <= 1 + high) & (r >= 1 - low),
        (QUADRANT, GOLDEN, FINITE_DIFFERENCE),
    ),
    Replacement(
        "PPO's two radii are swapped",
        "drpo.objectives.clip:PPOClip.__call__",
        _swapped("low", "high"),
        (f"{FORMULA}[ppo(0.2,0.28)]",),
    ),
    Replacement(
        "DPPO's two radii are swapped",
        "drpo.objectives.mask:DPPO.__call__",
        _swapped("delta_low", "delta_high"),
        (f"{FORMULA}[dppo(0.1,0.2)]",),
    ),
    Replacement(
        "SAPO's temperatures are exchanged",
        "drpo.objectives.surrogate:SAPO.__call__",
        _swapped("tau_positive", "tau_negative"),
        (f"{FORMULA}[sapo(1,1.05)]", GOLDEN),
    ),
    Replacement(
        "masked tokens count in the length of a GSPO sequence",
        "drpo.objectives.clip:_mean_over_sequence",
        lambda right: lambda values, keep, sequence: right(values, keep | True, sequence),
        (f"{REMOVED}[token_mean-gspo(0.3,0.4)]", f"{FORMULA}[gspo(0.3,0.4)]"),
    ),
    Replacement(
        "the ratio is not capped",
        "drpo.objectives.contract:MAX_LOG_RATIO",
        lambda right: 1e9,
        (EXTREME,),
    ),
    Replacement("bfloat16 inputs are not widened", "drpo.objectives.contract:wide", _unwidened, (BFLOAT16,)),
    Replacement(
        "log(1 - p) loses its digits where p is near 1",
        "drpo.objectives.mask:_log1mexp",
        _rounded_log1mexp,
        (f"{BINARY_KL}[float32-0.9999997-0.9999999]", f"{BINARY_KL}[float32-0.9999997-0.5]"),
    ),
    Replacement(
        "each part is divided by its own number of tokens",
        "drpo.objectives.contract:total",
        _mean_of_its_part,
        (f"{SPLIT}[token_mean-drpo(0.2)]", f"{SPLIT}[horizon(9)-drpo(0.2)]"),
    ),
    Replacement(
        "masked slots are exponentiated before they are masked",
        "drpo.objectives.contract:masked_safe",
        lambda right: lambda tokens: tokens,
        (f"{REMOVED}[token_mean-drpo(0.2)]", f"{REMOVED}[token_mean-spo(0.3)]", f"{REMOVED}[token_mean-ppo(0.2,0.28)]"),
    ),
    Replacement(
        "the entropy bonus lowers the entropy",
        "drpo.objectives.terms:entropy_bonus",
        lambda right: lambda entropy, coefficient: -right(entropy, coefficient),
        ("tests/test_terms.py::test_entropy_bonus_climbs_the_entropy",),
    ),
    Replacement(
        "the rest is forgotten in a divergence of the most probable",
        "drpo.objectives.divergence:_rest",
        lambda right: lambda logp: right(logp) * 0,
        (TOPK_GOLDEN, MERGED),
    ),
    Replacement(
        "the KL runs from the policy to the sampler",
        "drpo.objectives.divergence:_excess",
        lambda right: lambda log_p, log_q: right(log_q, log_p),
        (TOPK_GOLDEN, f"{TOPK}test_kl_runs_from_the_sampler_to_the_policy"),
    ),
)
