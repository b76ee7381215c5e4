"""Mistakes in the objectives, the advantages and the reductions."""

from typing import Any

from planted import Bug, Replacement

OBJECTIVES = "tests/test_objectives.py::"
GROUPS = "tests/test_advantages_reductions.py::"

FORMULA = f"{OBJECTIVES}test_gradient_and_weight_are_the_printed_formula"
LOSS = f"{OBJECTIVES}test_loss_is_the_printed_formula"
FINITE_DIFFERENCE = f"{OBJECTIVES}test_gradient_is_the_finite_difference_of_the_loss"
QUADRANT = f"{OBJECTIVES}test_weight_in_each_quadrant_of_advantage_and_ratio"
BOUNDARY = f"{OBJECTIVES}test_drpo_weight_is_zero_on_the_boundary_and_turns_round_beyond"
GOLDEN = f"{OBJECTIVES}test_golden_vectors"
EXTREME = f"{OBJECTIVES}test_extreme_ratios_stay_finite_and_exact_in_float32"
BFLOAT16 = f"{OBJECTIVES}test_bfloat16_inputs_are_widened_before_any_arithmetic"
BINARY_KL = f"{OBJECTIVES}test_binary_kl_at_the_ends_of_the_interval"
REMOVED = f"{OBJECTIVES}test_masked_token_is_a_removed_token"
ALL_MASKED = f"{OBJECTIVES}test_fully_masked_part_backpropagates_zero"
SPLIT = f"{OBJECTIVES}test_gradient_does_not_depend_on_the_split_or_the_order"
FLOW = f"{OBJECTIVES}test_gradient_flows_only_through_logp_and_inputs_stay_as_they_are"
ZERO_ADVANTAGE = f"{OBJECTIVES}test_zero_advantage_has_exactly_zero_gradient"
WEIGHT_TABLE = f"{GROUPS}test_golden_weights"

BUGS = (
    Bug(
        1,
        "masked slots are exponentiated before they are masked",
        "objectives/contract.py",
        "return torch.where(tokens.keep, values, torch.zeros_like(values))",
        "return values",
        (f"{REMOVED}[token_mean-drpo(0.2)]", f"{REMOVED}[token_mean-spo(0.3)]", f"{REMOVED}[token_mean-ppo(0.2,0.28)]"),
    ),
    Bug(
        2,
        "each part is divided by its own number of tokens",
        "objectives/contract.py",
        "return (weight * loss)[tokens.keep].sum()",
        "return (weight * loss)[tokens.keep].mean()",
        (f"{SPLIT}[token_mean-drpo(0.2)]", f"{SPLIT}[horizon(9)-drpo(0.2)]"),
    ),
    Bug(
        3,
        "masked tokens are summed, not dropped",
        "objectives/contract.py",
        "loss = ask(objective, tokens).loss\n    return (weight * loss)[tokens.keep].sum()",
        "loss = objective(tokens).loss\n    return (weight * loss).sum()",
        (REMOVED, ALL_MASKED),
    ),
    Bug(
        3,
        "masked tokens count in N",
        "reductions.py",
        "keep.sum())",
        "keep.numel())",
        (WEIGHT_TABLE, f"{REMOVED}[token_mean-drpo(0.2)]"),
    ),
    Bug(
        3,
        "fully masked sequences count in S",
        "reductions.py",
        "int((counts > 0).sum())",
        "len(numbers)",
        (WEIGHT_TABLE, f"{REMOVED}[horizon(9)-drpo(0.2)]"),
    ),
    Bug(
        3,
        "masked tokens count in the length of a GSPO sequence",
        "objectives/clip.py",
        "kept = keep.to(values.dtype)",
        "kept = torch.ones_like(values)",
        (f"{REMOVED}[token_mean-gspo(0.3,0.4)]", f"{FORMULA}[float64-gspo(0.3,0.4)]"),
    ),
    Bug(
        3,
        "a sequence without a kept token divides 0 by 0 in GSPO",
        "objectives/clip.py",
        "count.clamp(min=1)",
        "count",
        (f"{OBJECTIVES}test_loss_of_ordinary_masked_slots_is_finite[gspo(0.3,0.4)]",),
    ),
    Bug(
        8,
        "the quadratic penalty pushes outwards",
        "objectives/quadratic.py",
        "value=-r * advantage + pull * (r - 1) / 2, slope=-advantage * r + pull * r",
        "value=-r * advantage - pull * (r - 1) / 2, slope=-advantage * r - pull * r",
        (QUADRANT, GOLDEN, BOUNDARY),
    ),
    Bug(
        8,
        "DRPO's radius is a ratio's: every power is SPO's",
        "objectives/quadratic.py",
        "return _quadratic(tokens, self.delta, self.power, self.advantage_weighted, penalised)",
        "return _quadratic(tokens, self.delta, 1.0, self.advantage_weighted, penalised)",
        (QUADRANT, GOLDEN, f"{OBJECTIVES}test_drpo_weight_is_bounded"),
    ),
    Bug(
        8,
        "the region is twice as wide, in the loss and the gradient alike",
        "objectives/quadratic.py",
        "pull = shift(tokens, power) / radius",
        "pull = shift(tokens, power) / (2 * radius)",
        (QUADRANT, GOLDEN, f"{OBJECTIVES}test_drpo_pulls_back_exactly_what_dppo_drops"),
    ),
    Bug(
        8,
        "the gradient is not that of the loss",
        "objectives/quadratic.py",
        "pull * (r - 1) / 2",
        "pull * (r - 1)",
        (FINITE_DIFFERENCE, LOSS),
    ),
    Bug(
        8,
        "the penalty applies inside the radius instead of outside",
        "objectives/quadratic.py",
        "shift(tokens).abs() > self.outside",
        "shift(tokens).abs() <= self.outside",
        (f"{FORMULA}[float64-drpo(0.1,outside=0.15)]", QUADRANT),
    ),
    Bug(
        8,
        "DPPO's sides are exchanged",
        "objectives/mask.py",
        "keep = torch.where(advantage > 0, rising, falling)",
        "keep = torch.where(advantage <= 0, rising, falling)",
        (QUADRANT, f"{FORMULA}[float64-dppo(0.1,0.2)]"),
    ),
    Bug(
        8,
        "DPPO drops tokens whatever the way they moved",
        "objectives/mask.py",
        "rising = (moved <= self._high) | (logp <= behavior_logp)",
        "rising = moved <= self._high",
        (QUADRANT, GOLDEN),
    ),
    Bug(
        8,
        "PPO's clip looks at the ratio and not at the advantage's sign",
        "objectives/clip.py",
        "return torch.where(advantage > 0, r <= 1 + high, r >= 1 - low)",
        "return (r <= 1 + high) & (r >= 1 - low)",
        (QUADRANT, GOLDEN, FINITE_DIFFERENCE),
    ),
    Bug(
        8,
        "the dual clip acts on good answers",
        "objectives/clip.py",
        "weight = torch.where((advantage < 0) & (r > self.dual), 0, weight)",
        "weight = torch.where((advantage > 0) & (r > self.dual), 0, weight)",
        (f"{FORMULA}[float64-ppo(0.2,0.2,dual=3)]", QUADRANT),
    ),
    Bug(
        8,
        "SAPO's temperatures are exchanged",
        "objectives/surrogate.py",
        "torch.where(advantage > 0, r.new_tensor(self.tau_positive)",
        "torch.where(advantage <= 0, r.new_tensor(self.tau_positive)",
        (f"{FORMULA}[float64-sapo(1,1.05)]", GOLDEN),
    ),
    Bug(
        8,
        "CISPO's clip is a PPO clip: it drops tokens",
        "objectives/surrogate.py",
        "slope=-advantage * clipped)",
        "slope=-advantage * clipped * (clipped == ratio(tokens)))",
        (f"{FORMULA}[float64-cispo(0.2,0.28)]", GOLDEN),
    ),
    Bug(
        8,
        "the ratio before k2 carries a gradient",
        "objectives/terms.py",
        "weight = (logp - behavior_logp).detach()",
        "weight = (logp - behavior_logp)",
        ("tests/test_terms.py::test_k2_in_the_loss_descends_the_kl_to_the_reference",),
    ),
    Bug(
        8,
        "the entropy bonus lowers the entropy",
        "objectives/terms.py",
        "return -coefficient * entropy",
        "return coefficient * entropy",
        ("tests/test_terms.py::test_entropy_bonus_climbs_the_entropy",),
    ),
    Bug(
        9,
        "the ratio is not capped",
        "objectives/contract.py",
        "torch.exp(log_ratio(tokens).clamp(max=MAX_LOG_RATIO))",
        "torch.exp(log_ratio(tokens))",
        (EXTREME,),
    ),
    Bug(
        9,
        "a clamp silences the gradient of capped tokens",
        "objectives/contract.py",
        "loss: Tensor = _ClosedForm.apply(",
        "slope = torch.where((tokens.logp - tokens.behavior_logp) < MAX_LOG_RATIO, slope, 0)\n"
        "    loss: Tensor = _ClosedForm.apply(",
        (f"{EXTREME}[none]", f"{EXTREME}[drpo(0.2)]"),
    ),
    Bug(
        9,
        "D is made from the capped ratio",
        "objectives/contract.py",
        "return -moved.sign() * scale * torch.expm1(-moved.abs())",
        "return torch.exp((1 - power) * behavior_logp) * torch.expm1(moved.clamp(max=MAX_LOG_RATIO))",
        (f"{EXTREME}[drpo(0.2)]",),
    ),
    Bug(
        9,
        "1 - sigmoid(x) rounds SAPO's weight to 0",
        "objectives/surrogate.py",
        "torch.sigmoid(-tau * (r - 1))",
        "(1 - gate)",
        (f"{FORMULA}[float32-sapo(1,1.05)]",),
    ),
    Bug(
        10,
        "bfloat16 inputs are not widened",
        "objectives/contract.py",
        "return values if values.dtype == torch.float64 else values.float()",
        "return values",
        (BFLOAT16,),
    ),
    Bug(
        10,
        "log(1 - p) loses its digits where p is near 1",
        "objectives/mask.py",
        "torch.log(-torch.expm1(x))",
        "torch.log(1 - torch.exp(x))",
        (f"{BINARY_KL}[float32-0.9999997-0.9999999]", f"{BINARY_KL}[float32-0.9999997-0.5]"),
    ),
    Bug(
        10,
        "1 - mu loses its digits where mu is near 1",
        "objectives/mask.py",
        "-torch.expm1(behavior_logp)",
        "(1 - torch.exp(behavior_logp))",
        (f"{BINARY_KL}[float32-0.9999997-0.9999999]",),
    ),
    Bug(
        11,
        "equal rewards leave rounding noise, and zscore blows it up",
        "credit/advantages.py",
        "    wide = rewards.double()\n",
        "    return rewards - rewards.mean()\n    wide = rewards.double()\n",
        (f"{GROUPS}test_constant_group_has_exactly_zero_advantage[zscore]",),
    ),
    Bug(
        11,
        "a group of one sample is accepted",
        "credit/advantages.py",
        "len(rewards) < 2",
        "len(rewards) < 1",
        (f"{GROUPS}test_a_group_of_one_is_refused_with_what_to_change",),
    ),
    Bug(
        11,
        "a penalty leaks into groups without an advantage",
        "objectives/quadratic.py",
        "weight = advantage.abs() * self.coefficient",
        "weight = torch.full_like(r, self.coefficient)",
        (ZERO_ADVANTAGE,),
    ),
)


def _flows_everywhere(right: Any) -> Any:
    def token_loss(tokens: Any, value: Any, slope: Any) -> Any:
        from drpo.types import TokenLoss

        return TokenLoss(value + slope.detach() * (tokens.logp - tokens.logp.detach()))

    return token_loss


REPLACEMENTS = (
    Replacement(
        "the gradient flows through mu and the advantage too",
        "drpo.objectives.contract:token_loss",
        _flows_everywhere,
        (FLOW,),
    ),
)
