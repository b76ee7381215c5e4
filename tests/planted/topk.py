"""Mistakes in top-K divergences: the formulas, what the sampler reports, and the way from one to the other."""

from planted import Bug

TOPK = "tests/test_topk.py::"
MERGED = f"{TOPK}test_divergences_are_those_of_the_merged_laws"
GOLDEN = f"{TOPK}test_golden_vectors"
EXACT = f"{TOPK}test_all_words_make_the_exact_divergences"
DIRECTION = f"{TOPK}test_a_token_is_dropped_where_the_law_is_far_and_it_went_the_advantages_way"
OPERATOR = f"{TOPK}test_log_probabilities_at_the_ids_are_the_laws"
ENUMERATED = f"{TOPK}test_divergences_of_the_operator_are_the_enumerations"
ROUNDED = f"{TOPK}test_rounded_logits_make_no_divergence_of_their_own"
LEFT_OUT = f"{TOPK}test_what_is_left_out_is_as_good_as_gone"
LIKELIEST = f"{TOPK}test_the_likeliest_are_the_laws"
ENGINE = f"{TOPK}test_an_engine_reports_the_law_it_draws_from"
FRESH = f"{TOPK}test_fresh_weights_have_not_moved_and_moved_ones_have_by_so_much"

BUGS = (
    Bug(
        8,
        "the rest is forgotten in the total variation",
        "objectives/divergence.py",
        "return ((listed + (_rest(log_p) - _rest(log_q)).abs()) / 2)",
        "return (listed / 2)",
        (GOLDEN, MERGED),
    ),
    Bug(
        8,
        "the rest is forgotten in the KL",
        "objectives/divergence.py",
        "return (_excess(log_p, log_q) + _excess(rest_p, rest_q))",
        "return _excess(log_p, log_q)",
        (GOLDEN, MERGED),
    ),
    Bug(
        8,
        "the KL runs from the policy to the sampler",
        "objectives/divergence.py",
        "return (_excess(log_p, log_q) + _excess(rest_p, rest_q))",
        "return (_excess(log_q, log_p) + _excess(rest_q, rest_p))",
        (GOLDEN, f"{TOPK}test_kl_runs_from_the_sampler_to_the_policy"),
    ),
    Bug(
        8,
        "the total variation is not halved",
        "objectives/divergence.py",
        "(_rest(log_p) - _rest(log_q)).abs()) / 2).clamp(max=1)",
        "(_rest(log_p) - _rest(log_q)).abs()))",
        (GOLDEN, EXACT),
    ),
    Bug(
        10,
        "what rounding leaves of 1 has its logarithm taken",
        "objectives/divergence.py",
        "_rest(x).clamp(min=noise).log()",
        "_rest(x).clamp(min=1e-300).log()",
        (f"{TOPK}test_rounding_makes_no_divergence", EXACT),
    ),
    Bug(
        10,
        "the rest is 1 minus a rounded sum",
        "objectives/divergence.py",
        "return (-torch.expm1(top[..., 0]) - others).clamp(min=0)",
        "return (1 - (top[..., 0].exp() + others)).clamp(min=0)",
        (f"{TOPK}test_a_rest_next_to_nothing_keeps_its_digits",),
    ),
    Bug(
        9,
        "an impossible word makes a NaN",
        "objectives/divergence.py",
        "torch.where(p > 0, p * (log_p - log_q), 0)",
        "p * (log_p - log_q)",
        (f"{TOPK}test_impossible_words",),
    ),
    Bug(
        8,
        "a token is dropped whichever way it went, where its advantage is not positive",
        "objectives/mask.py",
        "falling = (moved <= self.delta_low) | (logp >= behavior_logp)",
        "falling = moved <= self.delta_low",
        (DIRECTION,),
    ),
    Bug(
        8,
        "the divergence of the sampled token stands for that of the law",
        "objectives/mask.py",
        "        return tokens.divergence\n",
        "        return shift(tokens).abs()\n",
        (DIRECTION,),
    ),
    Bug(
        5,
        "candidates are compared at temperature 1",
        "ops/chunked.py",
        "self._above = (z[:, 1:] - z[:, :1]).mul_(head.steepness)",
        "self._above = z[:, 1:] - z[:, :1]",
        (OPERATOR, ENUMERATED, f"{FRESH}[topk_tv-0.6]"),
    ),
    Bug(
        7,
        "candidates are one place late",
        "batch.py",
        "    return TopK.cat(tops) if same else None",
        "    return TopK(*(x.roll(1, 0) for x in vars(TopK.cat(tops)).values())) if same else None",
        (FRESH, f"{TOPK}test_exact_divergence_is_the_enumeration"),
    ),
    Bug(
        7,
        "each chunk is compared with the first places of the sampler",
        "ops/chunked.py",
        "TOPK[kind](logp, top.logp[places]) for kind in kinds",
        "TOPK[kind](logp, top.logp[: len(logp)]) for kind in kinds",
        (ENUMERATED,),
    ),
    Bug(
        18,
        "candidates are read after their row was overwritten",
        "ops/chunked.py",
        "return self._aside.make(self._part, (self._above + logp[:, None]).clamp_(max=0))",
        "z = self.logits.gather(1, self._aside.ids[self._part])\n"
        "        return self._aside.make(self._part, (z - z.logsumexp(1, keepdim=True)).clamp_(max=0))",
        (OPERATOR, ENUMERATED),
    ),
    Bug(
        18,
        "candidates are completed with another row's normaliser",
        "ops/chunked.py",
        "(self._above + logp[:, None]).clamp_(max=0)",
        "(self._above + logp.roll(1)[:, None]).clamp_(max=0)",
        (OPERATOR, ENUMERATED),
    ),
    Bug(
        10,
        "candidates have the rounded logits",
        "ops/chunked.py",
        'return out, {"exact": (words, full if self.bias is None else full + self.bias.float()[words])}',
        'return out, {"exact": (words, out.gather(1, words).float())}',
        (ROUNDED,),
    ),
    Bug(
        10,
        "candidates are had in full, but not in the normaliser",
        "ops/chunked.py",
        "            logp[part], entropy[part] = _rows(here.logits).statistics(\n"
        "                here.logits, target[part], head.steepness, **here.exact\n            )",
        "            short = {name: (w[:, :1], z[:, :1]) for name, (w, z) in here.exact.items()}\n"
        "            logp[part], entropy[part] = _rows(here.logits).statistics(\n"
        "                here.logits, target[part], head.steepness, **short\n            )",
        (ROUNDED,),
    ),
    Bug(
        3,
        "the sampler's report keeps the places that are left out",
        "ops/records.py",
        "None if self.top is None else self.top.at(chosen)",
        "None if self.top is None else self.top.at(slice(0, int(chosen.sum())))",
        (LEFT_OUT,),
    ),
    Bug(
        5,
        "the likeliest are reported at temperature 1",
        "rollout/sample.py",
        "log_p = torch.log_softmax(_scores(logits, sampling), dim=-1)",
        "log_p = torch.log_softmax(logits.float(), dim=-1)",
        (LIKELIEST, ENGINE),
    ),
    Bug(
        9,
        "small log-probabilities are logarithms of 0",
        "rollout/sample.py",
        "log_p = torch.log_softmax(_scores(logits, sampling), dim=-1)",
        "log_p = torch.softmax(_scores(logits, sampling), dim=-1).log()",
        (f"{TOPK}test_tiny_probabilities_stay_finite",),
    ),
    Bug(
        12,
        "the report is that of the rows that are left, in their new order",
        "rollout/decode.py",
        "top.ids[active, t], top.logp[active, t] = here.ids, here.logp",
        "top.ids[: len(active), t], top.logp[: len(active), t] = here.ids, here.logp",
        (ENGINE,),
    ),
    Bug(
        18,
        "additive terms forget the divergence",
        "train/auxiliary.py",
        "divergence = moved[kind]",
        "divergence = torch.zeros_like(moved[kind])",
        (f"{TOPK}test_any_micro_batches_and_additive_terms_see_the_same",),
    ),
    Bug(
        20,
        "a run does not ask its sampler for what the objective reads",
        "train/config.py",
        "and self.sampling.top_logprobs == 0:",
        "and self.sampling.top_logprobs > 0:",
        (f"{TOPK}test_a_run_asks_for_what_its_objective_reads",),
    ),
    Bug(
        19,
        "an update without tokens has no divergence to join",
        "types/training.py",
        "empty if with_divergence else None",
        "None",
        (f"{TOPK}test_an_update_without_tokens_joins_the_others",),
    ),
    Bug(
        19,
        "what is outside is judged by the sampled token",
        "objectives/mask.py",
        "        moved = self._moved(tokens)\n        return torch.where(logp > behavior_logp",
        "        moved = shift(tokens).abs()\n        return torch.where(logp > behavior_logp",
        (f"{FRESH}[topk_kl-1.0]",),
    ),
)
