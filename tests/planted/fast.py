"""Mistakes in the fused head, in packing and in shared prompts: what makes it fast must not make it wrong."""

from planted import Bug

OPS = "tests/test_ops.py::"
LOSS = "tests/test_policy_loss.py::"
PACKING = "tests/test_packing.py::"
BATCH = "tests/test_batch_policy.py::"

GRADCHECK = f"{OPS}test_gradcheck"
TIED = f"{OPS}test_tied_head_gets_the_sum_of_both_gradients"
IMPOSSIBLE = f"{OPS}test_impossible_words_are_words_that_are_not_there"
MANY_CHUNKS = f"{OPS}test_weight_gradient_of_many_chunks_is_accumulated_in_float32"
CONFIDENT = f"{OPS}test_a_confident_tokens_gradient_keeps_its_digits"
PLAIN_LOSS = f"{LOSS}test_it_is_the_plain_loss"
LEFT_OUT = f"{LOSS}test_what_is_left_out_is_as_good_as_gone"
SAME = f"{PACKING}test_packed_padded_and_one_by_one_are_the_same"
ANY_LAYOUT = f"{PACKING}test_any_layout"
FEELS = f"{PACKING}test_a_place_feels_what_it_sees_and_nothing_else"
TRAINED_IDS = f"{BATCH}test_trained_ids_are_the_sampled_ids"
PLAIN_LOGP = f"{BATCH}test_logp_and_entropy_are_the_plain_models"

BUGS = (
    Bug(
        5,
        "the head's gradient is not divided by the temperature",
        "ops/chunked.py",
        "up = grad_logp[part] * head.steepness",
        "up = grad_logp[part]",
        (GRADCHECK, TIED),
    ),
    Bug(
        5,
        "the fused gradient is not divided by the temperature",
        "ops/chunked.py",
        "-head.steepness * counts * gradient[part]",
        "-counts * gradient[part]",
        (PLAIN_LOSS,),
    ),
    Bug(
        2,
        "the fused gradient forgets what each token counts",
        "ops/chunked.py",
        "-head.steepness * counts * gradient[part]",
        "-head.steepness * gradient[part]",
        (PLAIN_LOSS, f"{LOSS}test_a_tied_head_gets_both_gradients"),
    ),
    Bug(
        3,
        "tokens that are not kept go through the fused loss",
        "ops/records.py",
        "return self.keep & (self.weight != 0)",
        "return self.weight != -1",
        (LEFT_OUT,),
    ),
    Bug(
        18,
        "the weight's gradient is the last chunk's",
        "ops/chunked.py",
        "total[words].addcmul_(product, unit)",
        "torch.mul(product, unit, out=total[words])",
        (MANY_CHUNKS,),
    ),
    Bug(
        18,
        "the weight's gradient is accumulated in the activations' dtype",
        "ops/chunked.py",
        "self.weight = torch.empty(weight.shape, dtype=wide,",
        "self.weight = torch.empty(weight.shape, dtype=hidden.dtype,",
        (MANY_CHUNKS,),
    ),
    Bug(
        18,
        "an upstream factor of the fused loss is lost",
        "ops/chunked.py",
        "return *gradients.results(None if float(slope) == 1 else slope), None",
        "return *gradients.results(), None",
        (f"{LOSS}test_the_loss_may_be_scaled_before_its_backward_pass",),
    ),
    Bug(
        18,
        "a sequence's objective is asked chunk by chunk",
        "ops/__init__.py",
        "chunked.linear_policy_loss if objective.tokenwise else _loss_of_all",
        "chunked.linear_policy_loss",
        (PLAIN_LOSS, f"{LOSS}test_a_tied_head_gets_both_gradients"),
    ),
    Bug(
        18,
        "all logits are held at once where no chunk is named",
        "ops/chunked.py",
        "most = how.chunk or max(1,",
        "most = how.chunk or len(hidden) + 0 * max(1,",
        (f"{OPS}test_never_holds_the_logits", f"{LOSS}test_never_holds_the_logits"),
    ),
    Bug(
        9,
        "an impossible word makes the entropy NaN",
        "ops/rows.py",
        "z.clamp_(min=NEVER).mul_(p)",
        "z.mul_(p)",
        (IMPOSSIBLE,),
    ),
    Bug(
        10,
        "the probability is rounded before the one is taken from it",
        "ops/rows.py",
        "out[rows] = p.scatter_add_(1, target[rows, None], p.new_full((len(p), 1), -1))",
        "out[rows] = p; out[rows].scatter_add_(1, target[rows, None], out.new_full((len(p), 1), -1))",
        (CONFIDENT,),
    ),
    Bug(
        10,
        "the target's own logit is rounded",
        "ops/chunked.py",
        'return out, {"exact": (words, full if self.bias is None else full + self.bias.float()[words])}',
        "return out, {}",
        (f"{OPS}test_the_targets_own_logit_is_not_rounded",),
    ),
    Bug(
        17,
        "rows are packed into one without a boundary",
        "packing.py",
        "packing=Packing.of(layout, input_ids.device)",
        "packing=Packing.of(Layout((len(input_ids),), (-1,)), input_ids.device)",
        (SAME, f"{BATCH}test_a_policy_shares_prompts_where_it_can"),
    ),
    Bug(
        17,
        "padding behind a shorter prompt is attended to",
        "packing.py",
        "there = (key < prefix)",
        "there = (key < prefix + len(key))",
        (SAME, ANY_LAYOUT),
    ),
    Bug(
        17,
        "every answer continues the first prompt of its bucket",
        "packing.py",
        "_rows(x[source], buckets[source]).index_select(0, parent)",
        "_rows(x[source], buckets[source]).index_select(0, parent * 0)",
        (SAME, FEELS),
    ),
    Bug(
        17,
        "an answer sees its own later tokens",
        "packing.py",
        "own = ((behind >= 0) &",
        "own = ((behind >= -1) &",
        (SAME, FEELS),
    ),
    Bug(
        17,
        "the window does not reach over the end of the prompt",
        "packing.py",
        "there = there & (prefix + place[:, None] - key < window)",
        "pass",
        (f"{SAME}[mistral, window 4-kernel]",),
    ),
    Bug(
        17,
        "the window is one place too wide",
        "packing.py",
        "(behind < (window or bucket.width))",
        "(behind <= (window or bucket.width))",
        (f"{SAME}[mistral, window 4-kernel]",),
    ),
    Bug(
        17,
        "padding has a gradient",
        "packing.py",
        "return x.index_select(0, packing.place).index_fill_(0, packing.padding, 0)",
        "return x.index_select(0, packing.place)",
        (SAME, ANY_LAYOUT),
    ),
    Bug(
        17,
        "soft caps and sinks are passed over",
        "packing.py",
        "    if asked or dropout:\n",
        "    if dropout:\n",
        (f"{PACKING}test_models_with_other_attention_keep_it",),
    ),
    Bug(
        17,
        "answers count their positions from 0",
        "types/training.py",
        "torch.cat([self.prefix_length(s) + torch.arange(n)",
        "torch.cat([torch.arange(n)",
        (TRAINED_IDS, SAME),
    ),
    Bug(
        7,
        "the first token of an answer is predicted from its group's last answer",
        "batch.py",
        "places.append(torch.cat([torch.tensor([last]),",
        "places.append(torch.cat([torch.tensor([max(last, first - 1)]),",
        (TRAINED_IDS, PLAIN_LOGP),
    ),
    Bug(
        7,
        "each token is predicted from itself",
        "batch.py",
        "return [first + len(prompt) - 1 + torch.arange(1 + len(answers[0]))]",
        "return [first + len(prompt) + torch.arange(1 + len(answers[0])).clamp(max=len(answers[0]) - 1)]",
        (TRAINED_IDS,),
    ),
)
