"""Mistakes in the objectives, their divergences and what they are made of."""

import math
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
GOLDEN_2026 = f"{OBJECTIVES}test_golden_vectors_of_2026"
BATCHES = "tests/test_batch_policy.py::"
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


def _silent_beyond_the_cap(right: Any) -> Any:
    def call(self: Any, tokens: Any) -> Any:
        from drpo.objectives import ratio
        from drpo.types import TokenLoss

        return TokenLoss(right(self, tokens).loss * (ratio(tokens) <= (self.max_ratio or 1e30)))

    return call


def _one_direction(right: Any) -> Any:
    def out_of_region(self: Any, tokens: Any) -> Any:
        from drpo.objectives.mask import binary_kl

        return binary_kl(tokens) > self.delta

    return out_of_region


def _all_truncated(right: Any) -> Any:
    def log_ratio(self: Any, tokens: Any) -> Any:
        return right(self, tokens).clamp(max=math.log(self.max_ratio or 1e30))

    return log_ratio


def _penalty_of_drpo(right: Any) -> Any:
    def call(self: Any, tokens: Any) -> Any:
        from drpo.objectives import DRPO, ImportanceSampling
        from drpo.types import TokenLoss

        surrogate = right(replace(self, delta=1e30), tokens).loss
        return TokenLoss(surrogate + DRPO(self.delta)(tokens).loss - ImportanceSampling()(tokens).loss)

    return call


def _geometric_vespo(right: Any) -> Any:
    def call(self: Any, tokens: Any) -> Any:
        from drpo.objectives.sequences import Sequences

        found = Sequences.sum
        Sequences.sum = lambda sequences, values: found(sequences, values) / found(sequences, values * 0 + 1)
        try:
            return right(self, tokens)
        finally:
            Sequences.sum = found

    return call


def _gmpo_both_ways(right: Any) -> Any:
    def call(self: Any, tokens: Any) -> Any:
        from drpo.objectives.ratios import log_ratio

        moved = tokens.behavior_logp + log_ratio(tokens).clamp(-self.low, self.high)
        return right(self, replace(tokens, logp=tokens.logp + (moved - tokens.logp).detach()))

    return call


def _all_count(right: Any) -> Any:
    def of_batch(self: Any, tokens: Any) -> Any:
        gap = tokens.logp - tokens.behavior_logp
        return right(self, replace(tokens, advantage=gap.sign() * tokens.advantage.abs().clamp(min=1)))

    return of_batch


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
        "drpo.objectives.closed_form:token_loss",
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
        "drpo.objectives.sequences:Sequences.mean",
        lambda right: lambda self, values: right(replace(self, keep=self.keep | True), values),
        (f"{REMOVED}[token_mean-gspo(0.3,0.4)]", f"{FORMULA}[gspo(0.3,0.4)]"),
    ),
    Replacement(
        "the ratio is not capped",
        "drpo.objectives.ratios:MAX_LOG_RATIO",
        lambda right: 1e9,
        (EXTREME,),
    ),
    Replacement(
        "what a factor rejects is trained",
        "drpo.objectives.composed:Product.__call__",
        lambda right: lambda self, tokens: self.objective(tokens),
        (f"{FORMULA}[none*band(0.5,1.5,'token')]", f"{FORMULA}[drpo(0.2)*reject('seq_mean_k3',0.2,0.0)]", GOLDEN_2026),
    ),
    Replacement(
        "k1 is the logarithm of r, not of 1/r",
        "drpo.objectives.factors:_outside",
        lambda right: lambda log_x, low, high: right(-log_x, low, high),
        (f"{FORMULA}[drpo(0.2)*reject('seq_mean_k1',4.0,0.9)]", GOLDEN_2026),
    ),
    Replacement(
        "OPSM drops successes too",
        "drpo.objectives.factors:OPSM.factor",
        lambda right: lambda self, tokens: (~self.out_of_region(tokens)).to(tokens.logp.dtype),
        (f"{FORMULA}[ppo(0.2,0.2,3)*opsm(0.1)*band(0.3,3)]", GOLDEN_2026),
    ),
    Replacement(
        "a term's weight is forgotten",
        "drpo.objectives.composed:Sum.__post_init__",
        lambda right: lambda self: object.__setattr__(self, "terms", tuple((1.0, o) for _, o in self.terms)),
        (f"{FORMULA}[mask(0.2) + 0.1*k2]",),
    ),
    Replacement(
        "IPO's cap silences what is beyond it",
        "drpo.objectives.mask:IPO.__call__",
        _silent_beyond_the_cap,
        (f"{FORMULA}[ipo(0.1,1.2)]",),
    ),
    Replacement(
        "IcePop's band is one-sided",
        "drpo.objectives.mask:IcePop.out_of_region",
        lambda right: lambda self, tokens: right(replace(self, low=0.0), tokens),
        (f"{FORMULA}[icepop(0.5,2)]", GOLDEN_2026),
    ),
    Replacement(
        "KPop bounds one direction",
        "drpo.objectives.mask:KPop.out_of_region",
        _one_direction,
        (f"{FORMULA}[kpop(0.05)]", GOLDEN_2026),
    ),
    Replacement(
        "a decoupled objective is held to the sampler",
        "drpo.objectives.composed:around_proximal",
        lambda right: lambda tokens: (tokens, right(tokens)[1]),
        (f"{FORMULA}[drpo(0.2)*proximal]", GOLDEN_2026),
    ),
    Replacement(
        "VESPO truncates the policy's part of the ratio too",
        "drpo.objectives.whole_sequences:VESPO._log_ratio",
        _all_truncated,
        (f"{FORMULA}[vespo(max_ratio=1.2)]", GOLDEN_2026),
    ),
    Replacement(
        "the cap silences a token in place of bounding it",
        "drpo.objectives.clip:PPOClip.__call__",
        _silent_beyond_the_cap,
        (f"{FORMULA}[ppo(0.2,0.28,max_ratio=1.3)]", GOLDEN_2026),
    ),
    Replacement(
        "TOPR takes the advantage for the reward",
        "drpo.objectives.topr:TOPR.__call__",
        lambda right: lambda self, tokens: right(self, replace(tokens, score=tokens.advantage)),
        (f"{FORMULA}[topr]", GOLDEN_2026),
    ),
    Replacement(
        "RefKL masks both sides",
        "drpo.objectives.distillation:RefKL.out_of_region",
        lambda right: lambda self, tokens: right(self, tokens) | (tokens.logp.exp() - tokens.behavior_logp.exp() > 0.1),
        (f"{FORMULA}[ref_kl(0.1)]",),
    ),
    Replacement(
        "CPPO's cap is forgotten",
        "drpo.objectives.cppo:masked_surrogate",
        lambda right: lambda tokens, kept, most: right(tokens, kept),
        (f"{FORMULA}[cppo(max_ratio=1.3)]",),
    ),
    Replacement(
        "CPPO's quantile is the 80 %",
        "drpo.objectives.cppo:QUANTILE",
        lambda right: 0.8,
        (f"{OBJECTIVES}test_cppos_schedule_and_budget_are_those_of_the_whole_sequence",),
    ),
    Replacement(
        "Clip-Cov keeps what it should drop",
        "drpo.objectives.whole_batch:_uniform",
        lambda right: lambda tokens: 1 - right(tokens) / 2,
        (f"{OBJECTIVES}test_clip_cov_drops_its_share_of_the_kept_tokens_in_the_mean",),
    ),
    Replacement(
        "DRPO-Eff's penalty keeps DRPO's ratio",
        "drpo.objectives.effective:DRPOEff.__call__",
        _penalty_of_drpo,
        (f"{FORMULA}[drpo_eff(0.2)]", GOLDEN_2026),
    ),
    Replacement(
        "every row has the batch's first reward",
        "drpo.batch:_micro_batch",
        lambda right: lambda rows: right([replace(row, score=rows[0].score) for row in rows]),
        (f"{BATCHES}test_every_token_has_the_reward_of_its_episode",),
    ),
    Replacement(
        "a token counts in its own prefix",
        "drpo.objectives.sequences:Sequences.before",
        lambda right: lambda self, values: right(self, values) + values,
        (f"{FORMULA}[cppo(0.1,0.5,0.01)]", GOLDEN_2026),
    ),
    Replacement(
        "positions are the order of the call",
        "drpo.objectives.sequences:_positions",
        lambda right: lambda tokens: tokens.sequence.new_ones(len(tokens.sequence)).cumsum(0),
        (f"{SPLIT}[token_mean-cppo(0.1,0.5,0.01)]",),
    ),
    Replacement(
        "VESPO takes the geometric mean",
        "drpo.objectives.whole_sequences:VESPO.__call__",
        _geometric_vespo,
        (f"{FORMULA}[vespo]", GOLDEN_2026),
    ),
    Replacement(
        "GMPO clips both ways",
        "drpo.objectives.whole_sequences:GMPO.__call__",
        _gmpo_both_ways,
        (f"{FORMULA}[gmpo(0.3,0.2)]", GOLDEN_2026),
    ),
    Replacement(
        "M2PO counts tokens that move inward",
        "drpo.objectives.whole_batch:M2PO.of_batch",
        _all_count,
        (f"{FORMULA}[m2po(0.1)]", GOLDEN_2026),
    ),
    Replacement(
        "the covariance is not centred",
        "drpo.objectives.whole_batch:Covariance.of",
        lambda right: lambda tokens: type(right(tokens))(0 * right(tokens).advantage, 0 * right(tokens).logp),
        (f"{FORMULA}[kl_cov(0.2,0.5)]", GOLDEN_2026),
    ),
    Replacement(
        "statistics of the batch are each micro-batch's",
        "drpo.train.step:with_statistics",
        lambda right: lambda policy, batch, objective, ranks=None: objective,
        (f"{BATCHES}test_any_micro_batches_give_the_same_update[m2po]",),
    ),
    Replacement("bfloat16 inputs are not widened", "drpo.objectives.ratios:wide", _unwidened, (BFLOAT16,)),
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
