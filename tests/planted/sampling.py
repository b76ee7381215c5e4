"""Mistakes in the distribution that is drawn from, in what it is said to be, and in whose weights it has."""

from types import SimpleNamespace
from typing import Any

from planted import Replacement

ROLLOUT = "tests/test_rollout.py::"
ENGINES = "tests/test_engines.py::"
DECODE = "tests/test_decode.py::"
BATCH = "tests/test_batch_policy.py::"
ROLLOUTS, AGAIN = "tests/test_rollouts.py::", "tests/test_dynamic_sampling.py::"
CLIENT = "tests/test_vllm_client.py::"
TURN_CACHE = "tests/test_turn_cache.py::"
FUSED = "tests/test_fused.py::"
OWN_DISTRIBUTION = f"{ENGINES}test_log_probabilities_are_the_models_own"
OWN_WEIGHTS = f"{ENGINES}test_new_weights_sample_once_they_are_loaded"
RESUMED = f"{ROLLOUTS}test_killed_and_resumed_is_one_run_bit_for_bit"
SENT = f"{CLIENT}test_what_is_sent_is_the_distribution_and_nothing_is_left_to_a_generation_config"


def _says_the_plain_distribution(right: Any) -> Any:
    def draw(logits: Any, u: Any, sampling: Any) -> Any:
        token, _ = right(logits, u, sampling)
        return token, logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0]

    return draw


def _not_renormalised(right: Any) -> Any:
    return lambda p, sampling: p.where(right(p, sampling) > 0, 0)


def _global_numbers(right: Any) -> Any:
    def uniforms(seed: Any, n: int) -> Any:
        import torch

        return torch.rand(n, dtype=torch.float64)

    return uniforms


def _at_temperature_1(right: Any) -> Any:
    return lambda hidden, head, tokens, objective, temperature: right(hidden, head, tokens, objective)


def _stays_behind(right: Any) -> Any:
    def keep(self: Any, rows: Any) -> None:
        mask = self.mask
        right(self, rows)
        self.mask = mask[: len(rows)]

    return keep


def _twice(right: Any) -> Any:
    def merged(self: Any) -> Any:
        plain = dict(self.model.named_parameters())
        for name, value in right(self):
            base = plain.get(name.replace(".weight", ".base_layer.weight"))
            yield name, value if base is None else 2 * value - base.detach()

    return merged


def _keeps_turns(right: Any) -> Any:
    def load_weights(self: Any, state: Any, version: int) -> None:
        kept = self._kept
        right(self, state, version)
        self._kept = kept

    return load_weights


def _unread(right: Any) -> Any:
    def take(self: Any, request: Any) -> Any:
        from drpo.rollout.turn_cache import Continued

        kept = self._rows.pop(request.after, None) if request.after is not None else None
        return kept and Continued(kept[1], request.prompt_ids[len(kept[0]) - 1 :])

    return take


def _one_more_ahead(right: Any) -> Any:
    def take(self: Any, step: int) -> Any:
        while self._next <= min(step + self._run.rollout.async_steps + 1, self._run.trainer.steps - 1):
            self._ahead.append(self._begin(self._next))
            self._next += 1
        return right(self, step)

    return take


def _copied(parameters: Any) -> Any:
    import torch

    return torch.cat([p.detach() for p in parameters])


def _without_the_last_block(right: Any) -> Any:
    def product(x: Any, weight: Any, bias: Any = None) -> Any:
        y = right(x, weight, bias)
        if len(weight) > 2048:
            y[:, len(weight) // 512 * 512 :] = 0
        return y

    return product


REPLACEMENTS = (
    Replacement(
        "the sampler forgets the temperature",
        "drpo.rollout.sample:_scores",
        lambda right: lambda logits, sampling: logits.float(),
        (
            OWN_DISTRIBUTION,
            f"{ROLLOUT}test_frequencies_are_the_softmax",
            f"{BATCH}test_on_policy_the_ratio_is_one[0.6]",
        ),
    ),
    Replacement(
        "the sampler reports log-probabilities without the temperature that it drew with",
        "drpo.rollout.sample:_draw",
        _says_the_plain_distribution,
        (
            OWN_DISTRIBUTION,
            f"{ROLLOUT}test_a_draw_reports_its_own_probability",
            f"{BATCH}test_on_policy_the_ratio_is_one[1.5]",
        ),
    ),
    Replacement(
        "the policy's loss forgets the temperature",
        "drpo.model.policy:linear_policy_loss",
        _at_temperature_1,
        (f"{BATCH}test_logp_and_entropy_are_the_plain_models[0.6]", f"{BATCH}test_on_policy_the_ratio_is_one[0.6]"),
    ),
    Replacement(
        "truncated probabilities are not renormalised",
        "drpo.rollout.sample:_truncate",
        _not_renormalised,
        (
            f"{ROLLOUT}test_truncation_leaves_only_the_allowed_and_renormalises",
            f"{ROLLOUT}test_the_mean_ratio_under_truncation_is_the_kept_mass",
        ),
    ),
    Replacement(
        "a draw takes the word after",
        "drpo.rollout.sample:_invert",
        lambda right: lambda p, u: (right(p, u) + 1) % p.shape[-1],
        (
            f"{DECODE}test_a_draw_inverts_the_distribution_function",
            f"{DECODE}test_evenly_spaced_numbers_give_every_word_its_share",
        ),
    ),
    Replacement(
        "random numbers come from the global generator",
        "drpo.rollout.sample:uniforms",
        _global_numbers,
        (
            f"{ENGINES}test_the_key_alone_decides_what_is_drawn",
            f"{ROLLOUT}test_uniforms_are_uniform_and_start_the_same_at_any_length",
        ),
    ),
    Replacement(
        "masks stay behind when rows leave the batch",
        "drpo.rollout.decode:PlainDecoder.keep",
        _stays_behind,
        (f"{DECODE}test_shared_prompts_give_the_logits_of_copied_ones",),
    ),
    Replacement(
        "what was kept of earlier turns outlives the weights that it was computed with",
        "drpo.rollout.transformers:TransformersEngine.load_weights",
        _keeps_turns,
        (f"{TURN_CACHE}test_what_was_computed_with_old_weights_is_not_used",),
    ),
    Replacement(
        "a kept row goes on whatever the prompt begins with",
        "drpo.rollout.turn_cache:TurnCache.take",
        _unread,
        (f"{TURN_CACHE}test_a_prompt_that_does_not_begin_with_what_was_kept_is_read_anew",),
    ),
    Replacement(
        "the token that a kept row sampled last counts as read",
        "drpo.rollout.cache:GroupCache.n_own",
        lambda right: lambda self, row, n_sampled: right(self, row, n_sampled + 1),
        (f"{TURN_CACHE}test_going_on_is_tried_before_it_is_used",),
    ),
    Replacement(
        "the engine samples with the trainer's own tensors",
        "drpo.rollout.transformers:copy",
        lambda right: SimpleNamespace(deepcopy=lambda model: model),
        (OWN_WEIGHTS,),
    ),
    Replacement(
        "adapters count twice",
        "drpo.model.policy:Policy._merged",
        _twice,
        (f"{BATCH}test_the_merged_state_is_the_adapted_model",),
    ),
    Replacement(
        "weights are synced while the old ones are still sampling",
        "drpo.train.rollouts:Rollouts.settle",
        lambda right: lambda self: None,
        (f"{ROLLOUTS}test_in_the_background_is_the_same_run_bit_for_bit[1-1-scripted]",),
    ),
    Replacement(
        "rollouts are one step older than asked for",
        "drpo.train.rollouts:Rollouts.take",
        _one_more_ahead,
        (f"{ROLLOUTS}test_every_rollout_is_sampled_with_the_weights_it_should_be",),
    ),
    Replacement(
        "rollouts in flight are drawn again after a crash",
        "drpo.train.rollouts:Rollouts.save",
        lambda right: lambda self, folder, step: None,
        (f"{RESUMED}[1-1-True]",),
    ),
    Replacement(
        "a group that is sampled again repeats its random numbers",
        "drpo.train.rollouts:Rollouts._sample",
        lambda right: lambda self, problems, key: right(self, problems, key[:2]),
        (f"{AGAIN}test_groups_of_equal_rewards_are_sampled_again_up_to_the_bound_and_dropped_beyond",),
    ),
    Replacement(
        "the temperature is not sent to vLLM",
        "drpo.rollout.vllm_request:parameters",
        lambda right: lambda request: right(request) | {"temperature": 1.0},
        (SENT, f"{ENGINES}test_log_probabilities_are_the_models_own"),
    ),
    Replacement(
        "the scale of 8-bit inputs is forgotten",
        "drpo.model.quantize:multiply",
        lambda right: lambda x, x_scale, w, bias, dtype: right(x, None, w, bias, dtype),
        ("tests/test_precision.py::test_the_product_is_that_of_the_rounded_operands",),
    ),
    Replacement(
        "the scale is that of the other e4m3 format, which ends at 240",
        "drpo.model.quantize:LARGEST",
        lambda right: {**right, "e4m3": 240.0},
        ("tests/test_precision.py::test_halfway_goes_to_the_even_value[e4m3]",),
    ),
    Replacement(
        "the fused step samples with copies of the weights",
        "drpo.rollout.fused:_adjacent_",
        lambda right: _copied,
        (
            f"{FUSED}test_merged_weights_are_the_layers_own",
            f"{FUSED}test_new_weights_are_sampled_with",
            f"{FUSED}test_a_stream_under_way_goes_on_with_loaded_weights",
        ),
    ),
    Replacement(
        "the fused step is used unchecked",
        "drpo.rollout.transformers:can_fuse",
        lambda right: lambda model: True,
        (f"{FUSED}test_a_step_that_differs_is_not_used_and_the_log_says_so",),
    ),
    Replacement(
        "the fused step takes any model whose layers have the right names",
        "drpo.rollout.fused:_is_changed",
        lambda right: lambda module: False,
        (f"{FUSED}test_a_model_with_anything_else_keeps_its_own_step",),
    ),
    Replacement(
        "the last columns of a product in blocks are left out",
        "drpo.model.product:product",
        _without_the_last_block,
        ("tests/test_product.py::test_each_way_to_multiply_is_the_product",),
    ),
)
