"""How completions are sampled. No torch, for code that only reads a configuration."""

from dataclasses import dataclass

from drpo.errors import InputError

COOLEST = 1e-6
"""The lowest temperature above 0: float32 has room for logits divided by it."""


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. This is the only temperature: it scales both mu and pi.

    Args:
        samples: completions per prompt (the group size G), >= 1.
        max_new_tokens: longest completion, in tokens, >= 1.
        temperature: divides the logits; from 1e-6 on; 0 means greedy, for evaluation.
        top_p: keep the smallest set of tokens with at least this probability, (0, 1]; 1 in training.
        top_k: keep the k most probable tokens; 0 means off; 0 in training.
        top_logprobs: report this many most probable tokens at each position; sampling itself does not change.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> Sampling(samples=4, top_p=0.9).require_trainable()
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: sampling.top_p=0.9: training needs top_p=1, because the sampler's log-probabilities \
would not be those of the distribution that was sampled; set --sampling.top-p 1
    """

    samples: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"sampling.samples={self.samples}: must be at least 1")
        if self.max_new_tokens < 1:
            raise InputError(f"sampling.max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.temperature != 0 and not COOLEST <= self.temperature < float("inf"):
            raise InputError(
                f"sampling.temperature={self.temperature}: must be finite, and at least {COOLEST:g} or 0 (the most "
                "probable token)"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling.top_p={self.top_p}: must be in (0, 1]")
        if self.top_k < 0:
            raise InputError(f"sampling.top_k={self.top_k}: must be 0 (off) or positive")
        if self.top_logprobs < 0:
            raise InputError(f"sampling.top_logprobs={self.top_logprobs}: must be 0 (none) or positive")

    def require_trainable(self, least: int = 2) -> None:
        """Raise for settings that training cannot correct for: truncated support, temperature 0, too few samples.

        Args:
            least: smallest number of samples per prompt; 1 with a critic, whose advantages compare no samples.
        """
        truncated = "because the sampler's log-probabilities would not be those of the distribution that was sampled"
        if self.top_p != 1:
            raise InputError(
                f"sampling.top_p={self.top_p}: training needs top_p=1, {truncated}; set --sampling.top-p 1"
            )
        if self.top_k != 0:
            raise InputError(
                f"sampling.top_k={self.top_k}: training needs top_k off, {truncated}; set --sampling.top-k 0"
            )
        if self.temperature == 0:
            raise InputError("sampling.temperature=0: training needs a temperature above 0; greedy is for evaluation")
        if self.samples < least:
            raise InputError(
                f"sampling.samples={self.samples}: an advantage compares the samples of one prompt; "
                "training needs at least 2, or a critic"
            )
