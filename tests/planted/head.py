"""Mistakes in the fused head: its gradients, its temperature, its digits."""

from types import SimpleNamespace
from typing import Any

from planted import Replacement

OPS = "tests/test_ops.py::"
LOSS = "tests/test_policy_loss.py::"
GRADCHECK = f"{OPS}test_gradcheck"
TIED = f"{OPS}test_tied_head_gets_the_sum_of_both_gradients"
MANY_CHUNKS = f"{OPS}test_weight_gradient_of_many_chunks_is_accumulated_in_float32"
PLAIN = f"{LOSS}test_it_is_the_plain_loss"


def _without_temperature(right: Any) -> Any:
    def add(self: Any, head: Any, part: Any, hidden: Any, slopes: Any, factor: Any) -> None:
        right(self, head, part, hidden, slopes, factor / head.steepness)

    return add


def _last_chunk(right: Any) -> Any:
    def add(self: Any, *given: Any) -> None:
        self._empty, before = True, self._empty
        right(self, *given)
        self._empty = before

    return add


def _constant_entropy(right: Any) -> Any:
    def slope(logits: Any, target: Any, scale: Any, grad_logp: Any, grad_entropy: Any, *rest: Any, **exact: Any) -> Any:
        return right(logits, target, scale, grad_logp, grad_entropy * 0, *rest, **exact)

    return slope


def _uncounted(right: Any) -> Any:
    """A call of the fused loss in which every token counts the same."""

    def apply(hidden: Any, weight: Any, bias: Any, given: Any, how: Any) -> Any:
        sampled = given.sampled
        even = SimpleNamespace(**{**vars(sampled), "weight": (sampled.weight != 0).to(sampled.weight.dtype)})
        return right.apply(hidden, weight, bias, given._replace(sampled=even), how)

    return SimpleNamespace(apply=apply)


REPLACEMENTS = (
    Replacement(
        "the head's gradient is not divided by the temperature",
        "drpo.ops.chunked:_Gradients.add",
        _without_temperature,
        (TIED, PLAIN),
    ),
    Replacement(
        "the weight's gradient is the last chunk's", "drpo.ops.chunked:_Gradients._add", _last_chunk, (MANY_CHUNKS,)
    ),
    Replacement(
        "an upstream factor of the fused loss is lost",
        "drpo.ops.chunked:_Gradients.results",
        lambda right: lambda self, slope=None: right(self),
        (f"{LOSS}test_the_loss_may_be_scaled_before_its_backward_pass",),
    ),
    Replacement(
        "the fused loss forgets what each token counts", "drpo.ops.chunked:_LinearPolicyLoss", _uncounted, (PLAIN,)
    ),
    Replacement("the entropy has no gradient", "drpo.ops.rows:slope", _constant_entropy, (GRADCHECK, TIED)),
    Replacement(
        "an impossible word makes the entropy NaN",
        "drpo.ops.rows:NEVER",
        lambda right: float("-inf"),
        (f"{OPS}test_impossible_tokens_are_absent_tokens",),
    ),
    Replacement(
        "the target's own logit is rounded",
        "drpo.ops.chunk_logits:ChunkedHead.linear",
        lambda right: lambda self, hidden, words: (right(self, hidden, words)[0], {}),
        (f"{OPS}test_the_targets_own_logit_is_not_rounded",),
    ),
    Replacement(
        "tokens that are not kept go through the fused loss",
        "drpo.ops.records:SampledTokens.trained",
        lambda right: lambda self: right(self) | True,
        (f"{LOSS}test_what_is_left_out_is_as_good_as_gone",),
    ),
)
