"""Mistakes in the head operator, the rollouts, the batches, the policy and the metrics."""

from planted import Bug

OPS = "tests/test_ops.py::"
TRITON = "tests/test_triton.py::"
ROLLOUT = "tests/test_rollout.py::"
BATCH = "tests/test_batch_policy.py::"
METRICS = "tests/test_metrics.py::"

DECODE = "tests/test_decode.py::"
SHARED = f"{DECODE}test_shared_prompts_give_the_logits_of_copied_ones"
ALONE = f"{DECODE}test_completions_are_those_of_one_row_alone_without_a_cache[gemma2, soft cap]"
ANY_BATCH = f"{DECODE}test_any_shape_of_batch"
INVERTS = f"{DECODE}test_a_draw_inverts_the_distribution_function"
ENDS = f"{ROLLOUT}test_the_first_eos_ends_and_is_included"
OWN_LAW = f"{ROLLOUT}test_behavior_logp_is_the_models_own"
NEIGHBOURS = f"{ROLLOUT}test_neighbours_do_not_matter"
FAMILIES = f"{ROLLOUT}test_other_architectures_report_their_own_law_and_do_not_see_padding"
STOPPING = f"{ROLLOUT}test_stopping_cuts_what_would_have_been_drawn"
NAMES = f"{ROLLOUT}test_every_part_of_the_name_of_a_draw_matters"
GLOBAL_STREAM = f"{ROLLOUT}test_torchs_global_stream_is_neither_read_nor_moved"
TRUNCATION = f"{ROLLOUT}test_truncation_leaves_only_the_allowed_and_renormalises"
KEPT_MASS = f"{ROLLOUT}test_the_mean_ratio_under_truncation_is_the_kept_mass"
REFUSES = f"{ROLLOUT}test_training_refuses_a_law_that_it_cannot_correct_for"
OWN_WEIGHTS = f"{ROLLOUT}test_the_engine_has_its_own_weights_until_load"
CANARY = f"{ROLLOUT}test_sync_canary"
BROKEN = f"{ROLLOUT}test_broken_log_probabilities_are_named"
TRAINED_IDS = f"{BATCH}test_trained_ids_are_the_sampled_ids"
PLAIN_LOGP = f"{BATCH}test_logp_and_entropy_are_the_plain_models"
ON_POLICY = f"{BATCH}test_on_policy_the_ratio_is_one"
MICRO_BATCHES = f"{BATCH}test_any_micro_batches_give_the_same_update"
NEIGHBOUR_TOKENS = f"{BATCH}test_a_neighbours_tokens_change_nothing"
WEIGHTS = f"{BATCH}test_weights_sum_to_what_the_reduction_says"
SKIPPING = f"{BATCH}test_skipping_zero_advantages_is_exact"
SILENT = f"{BATCH}test_a_batch_that_says_nothing_still_steps"
ANCHOR = f"{BATCH}test_the_anchor_is_what_the_sampler_reported_through_all_updates"
FORWARDS = f"{BATCH}test_one_forward_pass_for_each_micro_batch"
PROMPT_ALONE = f"{BATCH}test_a_reward_of_the_prompt_alone_teaches_nothing"
EACH_REWARD = f"{BATCH}test_each_reward_stays_with_its_completion"
MERGING = f"{BATCH}test_merging_a_thousand_times_leaves_the_base_as_it_was"
MERGED = f"{BATCH}test_the_merged_state_is_the_adapted_model"
SAVED = f"{BATCH}test_saved_loaded_and_sampled_from"
GRADCHECK = f"{OPS}test_gradcheck"
TIED = f"{OPS}test_tied_head_gets_the_sum_of_both_gradients"
IMPOSSIBLE = f"{OPS}test_impossible_words_are_words_that_are_not_there"
INTERPRETED = f"{TRITON}test_in_triton_s_interpreter[interpreted and not slow]"
ROLLOUT_ORACLE = f"{METRICS}test_rollout_figures_are_the_oracles"
TOKEN_ORACLE = f"{METRICS}test_token_figures_are_the_oracles"
STEP_ORACLE = f"{METRICS}test_a_steps_figures_do_not_depend_on_its_updates"

BUGS = (
    Bug(
        2,
        "each micro-batch is divided by its own number of rows",
        "batch.py",
        "weight=torch.cat([r.weight for r in rows]),",
        "weight=torch.cat([r.weight for r in rows]) * 8 / len(rows),",
        (f"{MICRO_BATCHES}[float64-drpo-horizon]", WEIGHTS),
    ),
    Bug(
        4,
        "the EOS that was drawn is left out",
        "rollout/decode.py",
        "ends.int().argmax(1) + 1",
        "ends.int().argmax(1).clamp(min=1)",
        (ENDS, STOPPING),
    ),
    Bug(
        4,
        "tokens that look like padding are not trained",
        "batch.py",
        "weight=torch.cat([r.weight for r in rows]),",
        "weight=torch.cat([r.weight * (r.completion.token_ids != 0) for r in rows]),",
        (TRAINED_IDS,),
    ),
    Bug(
        5,
        "the sampler forgets the temperature",
        "rollout/sample.py",
        "return scores if sampling.temperature in (0, 1) else scores / sampling.temperature",
        "return scores",
        (OWN_LAW, f"{ROLLOUT}test_frequencies_are_the_softmax", f"{ON_POLICY}[0.6]"),
    ),
    Bug(
        5,
        "the sampler reports log-probabilities without the temperature that it drew with",
        "rollout/sample.py",
        "return token, p.gather(-1, token[:, None])[:, 0].log()",
        "return token, torch.log_softmax(logits.float(), dim=-1).gather(-1, token[:, None])[:, 0]",
        (OWN_LAW, f"{ROLLOUT}test_a_draw_reports_its_own_probability", f"{ON_POLICY}[1.5]"),
    ),
    Bug(
        5,
        "the policy forgets the temperature, in log-probability and entropy",
        "policy.py",
        "micro.target, self.temperature)",
        "micro.target)",
        (f"{BATCH}test_with_and_without_its_gradient_it_is_the_same_law",),
    ),
    Bug(
        5,
        "the policy's loss forgets the temperature",
        "policy.py",
        "tokens, objective, temperature=self.temperature)",
        "tokens, objective)",
        (f"{PLAIN_LOGP}[0.6]", f"{ON_POLICY}[0.6]"),
    ),
    Bug(
        6,
        "a run takes truncated sampling",
        "train/config.py",
        "self.sampling.require_trainable(least=2 if self.critic is None else 1)",
        "pass",
        (REFUSES,),
    ),
    Bug(
        6,
        "truncated probabilities are not renormalised",
        "rollout/sample.py",
        "ordered / ordered.sum(-1, keepdim=True)",
        "ordered",
        (TRUNCATION, KEPT_MASS),
    ),
    Bug(
        7,
        "the policy itself is the anchor",
        "types/training.py",
        "return Tokens(logp, self.behavior_logp,",
        "return Tokens(logp, logp.detach(),",
        (ANCHOR,),
    ),
    Bug(
        7,
        "log-probabilities are computed once more before the update",
        "train/step.py",
        "        losses.loss.backward()\n",
        "        policy(micro)\n        losses.loss.backward()\n",
        (FORWARDS,),
    ),
    Bug(
        7,
        "the anchor is rounded to bfloat16 on its way",
        "batch.py",
        "behavior_logp=torch.cat([s.behavior_logp for s in sequences]),",
        "behavior_logp=torch.cat([s.behavior_logp.bfloat16().float() for s in sequences]),",
        (ANCHOR, TRAINED_IDS, ON_POLICY),
    ),
    Bug(
        9,
        "positive log-probabilities pass",
        "types/rollout.py",
        "~torch.isfinite(self.behavior_logp) | (self.behavior_logp > 0)",
        "~torch.isfinite(self.behavior_logp)",
        (f"{BROKEN}[positive]",),
    ),
    Bug(
        9,
        "NaN log-probabilities pass",
        "types/rollout.py",
        "~torch.isfinite(self.behavior_logp) | (self.behavior_logp > 0)",
        "self.behavior_logp.isinf() | (self.behavior_logp > 0)",
        (f"{BROKEN}[NaN]",),
    ),
    Bug(
        13,
        "random numbers come from the global generator",
        "rollout/sample.py",
        "torch.rand(n, generator=torch.Generator().manual_seed(derive(*seed)), dtype=torch.float64)",
        "torch.rand(n, dtype=torch.float64)",
        (GLOBAL_STREAM, f"{ROLLOUT}test_uniforms_are_uniform_and_start_the_same_at_any_length"),
    ),
    Bug(
        13,
        "random numbers move up when a row ends",
        "rollout/decode.py",
        "u[active, t]",
        "u[: len(active), t]",
        (NEIGHBOURS, STOPPING),
    ),
    Bug(
        14,
        "the tied head keeps its old weights",
        "rollout/transformers.py",
        "take(state[name])",
        '"embed_tokens" in name or take(state[name])',
        (CANARY,),
    ),
    Bug(
        14,
        "the version is not stamped",
        "rollout/transformers.py",
        "self.version = version",
        "self.version = self.version",
        (OWN_WEIGHTS,),
    ),
    Bug(
        14,
        "the engine samples with the trainer's own tensors",
        "rollout/transformers.py",
        "copy.deepcopy(model)",
        "model",
        (OWN_WEIGHTS, f"{ROLLOUT}test_a_bfloat16_engine_rounds_its_parameters_and_nothing_else"),
    ),
    Bug(
        15,
        "adapters are merged in place",
        "policy.py",
        'parameter + adapted[plain].get_delta_weight("default")',
        'parameter.add_(adapted[plain].get_delta_weight("default"))',
        (MERGING, f"{SAVED}[4]"),
    ),
    Bug(
        15,
        "adapters count twice",
        "policy.py",
        'parameter + adapted[plain].get_delta_weight("default")',
        'parameter + 2 * adapted[plain].get_delta_weight("default")',
        (MERGED, f"{SAVED}[4]"),
    ),
    Bug(
        15,
        "the engine gets the base without its adapters",
        "policy.py",
        "if plain in adapted:",
        "if not adapted:",
        (MERGED, f"{SAVED}[4]", f"{BATCH}test_after_a_lora_update_the_engine_samples_with_the_adapted_law"),
    ),
    Bug(
        15,
        "the base is trained with its adapters",
        "policy.py",
        "inject_adapter_in_model(config, model)",
        "inject_adapter_in_model(config, model).requires_grad_(True)",
        (f"{BATCH}test_lora_trains_the_adapters_of_all_linear_layers_but_the_head",),
    ),
    Bug(
        16,
        "tokens that were added to the vocabulary become another one",
        "batch.py",
        "target=torch.cat([s.token_ids[s.sampled] for s in sequences]),",
        "target=torch.cat([s.token_ids[s.sampled] for s in sequences]).clamp(max=256),",
        (TRAINED_IDS,),
    ),
    Bug(
        16,
        "special tokens are put before what the chat template wrote",
        "rollout/prompts.py",
        'tokenizer(text, add_special_tokens=False)["input_ids"]  #',
        'tokenizer(text)["input_ids"]  #',
        (f"{ROLLOUT}test_the_templates_special_tokens_are_not_added_twice",),
    ),
    Bug(
        17,
        "left padding is attended to",
        "rollout/decode.py",
        "mask = torch.zeros_like(ids)",
        "mask = torch.ones_like(ids)",
        (ANY_BATCH, ALONE),
    ),
    Bug(
        17,
        "positions count the padding while the prompt is read",
        "rollout/decode.py",
        "position_ids=(mask.cumsum(1) - 1).clamp(min=0)",
        "position_ids=torch.arange(mask.shape[1], device=mask.device).expand_as(mask)",
        (ANY_BATCH, ALONE),
    ),
    Bug(
        17,
        "positions count the padding while tokens are drawn",
        "rollout/decode.py",
        "mask.sum(1).repeat_interleave(samples)",
        "torch.full((len(prompts) * samples,), mask.shape[1])",
        (SHARED,),
    ),
    Bug(
        17,
        "places stay behind when rows leave the batch",
        "rollout/decode.py",
        "self.position = self.position[rows]",
        "self.position = self.position[: len(rows)]",
        (SHARED,),
    ),
    Bug(
        17,
        "masks stay behind when rows leave the batch",
        "rollout/decode.py",
        "self.mask = self.mask[rows]",
        "self.mask = self.mask[: len(rows)]",
        (SHARED, ALONE),
    ),
    Bug(
        4,
        "the draws of rows that have ended count",
        "rollout/decode.py",
        "active, token, alive, idle = active[going], token[going], alive[going], 0",
        "active, token, alive, idle = active[: len(going)], token[going], alive[going], 0",
        (f"{DECODE}test_dropping_ended_rows_changes_no_row", NEIGHBOURS),
    ),
    Bug(
        4,
        "rows that have ended go on to the end",
        "rollout/decode.py",
        "idle += every * (len(active) - len(going))",
        "pass",
        (f"{DECODE}test_ended_rows_do_not_go_on_for_long",),
    ),
    Bug(
        17,
        "padding of prompts is attended to while tokens are drawn",
        "rollout/cache.py",
        "hidden[:, :prompt_length] = self._padding[self.prompt]",
        "pass",
        (SHARED, f"{DECODE}test_prompts_are_shared_where_attention_is_ordinary"),
    ),
    Bug(
        17,
        "places of the cache that nothing was written to are attended to",
        "rollout/cache.py",
        "hidden[:, end:] = True",
        "pass",
        (SHARED, f"{DECODE}test_prompts_are_shared_where_attention_is_ordinary"),
    ),
    Bug(
        17,
        "the sliding window is one token too long while tokens are drawn",
        "rollout/cache.py",
        "max(0, end - layer.window)",
        "max(0, end - layer.window - 1)",
        (f"{SHARED}[mistral, sliding window]", f"{SHARED}[gemma3, mixed windows]"),
    ),
    Bug(
        17,
        "rows are matched with the prompts of those that left",
        "rollout/cache.py",
        "layer.prompt_keys, layer.prompt_values = layer.prompt_keys[kept], layer.prompt_values[kept]",
        "layer.prompt_keys, layer.prompt_values = (layer.prompt_keys[: len(kept)], layer.prompt_values[: len(kept)])",
        (SHARED,),
    ),
    Bug(
        17,
        "a group with gaps is laid out as one without",
        "rollout/cache.py",
        "self._ragged = len(rows) < len(kept) * self.width",
        "self._ragged = False",
        (SHARED,),
    ),
    Bug(
        17,
        "a row's own keys stay behind when rows leave the batch",
        "rollout/cache.py",
        "old[:, :, :length][rows]",
        "old[: len(rows), :, :length]",
        (SHARED,),
    ),
    Bug(
        17,
        "the prompt's share of the attention is weighed by itself",
        "rollout/attention.py",
        "weights = torch.softmax(scores, dim=-1)",
        "weights = torch.cat([x.softmax(-1) for x in scores.split([prompt_length, key.shape[2]], -1)], -1)",
        (SHARED, f"{DECODE}test_prompts_are_shared_where_attention_is_ordinary"),
    ),
    Bug(
        17,
        "a soft cap is passed over",
        "rollout/attention.py",
        "if asked or attention_mask",
        "if attention_mask",
        (f"{DECODE}test_a_request_that_is_not_served_is_refused",),
    ),
    Bug(
        5,
        "a draw takes the block before",
        "rollout/sample.py",
        "cumulative.gather(-1, (block - 1).clamp(min=0)).where(block > 0, 0)",
        "cumulative.gather(-1, block)",
        (INVERTS, f"{DECODE}test_evenly_spaced_numbers_give_every_word_its_share"),
    ),
    Bug(
        5,
        "a word of probability 0 is drawn at the end of the interval",
        "rollout/sample.py",
        "return torch.minimum(x, torch.nextafter(total, torch.zeros_like(total)))",
        "return x",
        (INVERTS,),
    ),
    Bug(
        18,
        "the entropy has no gradient",
        "ops/chunked.py",
        "with_entropy = bool(grad_entropy.any())",
        "with_entropy = False",
        (GRADCHECK, TIED),
    ),
    Bug(
        18,
        "a kernel's running entropy forgets that the maximum rose",
        "ops/triton.py",
        "shrink * (tilt + fall * total) + tl.sum(weight",
        "shrink * tilt + tl.sum(weight",
        (INTERPRETED,),
    ),
    Bug(
        18,
        "an impossible word makes a kernel's slope NaN",
        "ops/triton.py",
        "tl.maximum(log_p, -1e38) + tl.load(entropy + row)",
        "log_p + tl.load(entropy + row)",
        (INTERPRETED,),
    ),
    Bug(
        18,
        "a kernel counts its logits in 32 bits",
        "ops/triton.py",
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        (f"{TRITON}test_compiles_for_hopper",),
    ),
    Bug(
        18,
        "kernels are asked for where they cannot run",
        "ops/triton.py",
        'return INTERPRETED and device.type == "cpu"',
        'return device.type == "cpu"',
        (f"{TRITON}test_without_a_gpu",),
    ),
    Bug(
        19,
        "the mean reward is a mean of means",
        "train/metrics.py",
        "float(rewards.mean())",
        "float(torch.stack([g.rewards.mean() for g in marked]).mean())",
        (ROLLOUT_ORACLE,),
    ),
    Bug(
        19,
        "abstentions count as failures",
        "train/metrics.py",
        '"reward_failed": len(failures),',
        '"reward_failed": len(unmarked),',
        (ROLLOUT_ORACLE,),
    ),
    Bug(
        19,
        "masked tokens count in the figures",
        "train/metrics.py",
        "stats = _kept(stats)",
        "stats = stats",
        (f"{METRICS}test_tokens_that_are_not_kept_count_nowhere", TOKEN_ORACLE),
    ),
    Bug(
        19,
        "a step's figures are those of its last update",
        "train/metrics.py",
        "record: dict[str, object] = dict(rollout_metrics(step, groups))",
        "record: dict[str, object] = dict(rollout_metrics(step, groups))\n    stats = stats[-1:]",
        (f"{STEP_ORACLE}[drpo-uneven]",),
    ),
    Bug(
        19,
        "the divergence estimate has the wrong sign",
        "train/metrics.py",
        "(shift(tokens, power=1.0) - moved_by)",
        "(shift(tokens, power=1.0) + moved_by)",
        (TOKEN_ORACLE,),
    ),
    Bug(
        19,
        "pass@k draws with replacement",
        "train/evaluate.py",
        "return 1 - math.comb(n - n_right, k) / math.comb(n, k)",
        "return 1 - (1 - n_right / n) ** k",
        (
            f"{METRICS}test_pass_at_k_is_the_share_of_subsets_with_a_right_one",
            f"{METRICS}test_one_right_of_four_passes_at_four",
        ),
    ),
    Bug(
        19,
        "the interval is one-sided",
        "train/evaluate.py",
        "_score_interval(mean, n, NormalDist().inv_cdf((1 + level) / 2))",
        "_score_interval(mean, n, NormalDist().inv_cdf(level))",
        (f"{METRICS}test_interval_is_scipys",),
    ),
    Bug(
        19,
        "accuracy weighs problems by their marks",
        "train/evaluate.py",
        "sum(means.values()) / len(means)",
        "float(__import__('torch').cat([g.rewards for g in marked]).double().mean())",
        (f"{METRICS}test_evaluation_weighs_problems_alike_and_counts_right_answers",),
    ),
)
