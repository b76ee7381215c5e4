"""Mistakes in the custom loss for prime-rl."""

from planted import Bug

T = "tests/adapters/test_prime_rl.py::"
FILE = "adapters/prime_rl.py"
GRADIENT = f"{T}test_gradient_through_the_wiring"
OUTSIDE = f"{T}test_what_stands_outside_the_mask_has_no_effect"

BUGS = (
    Bug(
        9,
        "the mean where prime-rl expects the sum",
        FILE,
        "return LossOutputs(loss.sum(), {",
        "return LossOutputs(loss.mean(), {",
        (f"{T}test_loss_is_the_sum_over_trained_tokens", f"{GRADIENT}[drpo(0.2)-False]"),
    ),
    Bug(
        9,
        "prime-rl's weights per token are forgotten",
        FILE,
        "if inputs.loss_weights is not None:",
        "if False:",
        (f"{T}test_loss_is_the_sum_over_trained_tokens", f"{GRADIENT}[drpo(0.2)-True]"),
    ),
    Bug(
        4,
        "what stands outside the mask is multiplied, not left out",
        FILE,
        "        weights = inputs.loss_weights[inputs.loss_mask]\n",
        "        loss, weights = token_loss(chosen, *columns), inputs.loss_weights\n",
        (f"{OUTSIDE}[nan]", f"{OUTSIDE}[inf]"),
    ),
    Bug(
        3,
        "the policy's own log-probabilities in the sampler's place",
        FILE,
        "columns = (inputs.trainer_logprobs, inputs.inference_logprobs,",
        "columns = (inputs.trainer_logprobs, inputs.trainer_logprobs.detach(),",
        (f"{GRADIENT}[drpo(0.2)-False]", f"{T}test_metrics_stack"),
    ),
)
