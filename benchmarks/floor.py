"""The least that a training step can take: its floating-point operations, divided by what matrix products reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What a training step computes; attention's own products and everything that is not one are left out.

    Args:
        body: numbers in all matrices but embedding and head; each costs a token 2 operations forward, 6 in training.
        head: numbers in the head.
        prompts: how many.
        rows: completions of all prompts.
        prompt_tokens: of all prompts together, each counted once.
        sampled: tokens of all completions.
    """

    body: int
    head: int
    prompts: int
    rows: int
    prompt_tokens: float
    sampled: float

    @property
    def _repeated(self) -> float:
        """Prompt tokens with each prompt counted once per sample."""
        return self.prompt_tokens * self.rows / self.prompts

    def flops(self, *, shared: bool) -> float:
        """Return the operations of rollout and training together.

        The last token of a completion is predicted but goes through the body in neither; the head is needed where a
        token is predicted. Sampling needs no backward pass.

        Args:
            shared: each prompt goes through once per group, in both; else once per sample, in both.

        Returns:
            Floating-point operations.
        """
        prompt = self.prompt_tokens if shared else self._repeated
        # The first token of a completion is predicted at the prompt's last place, shared or not.
        places = prompt + self.sampled - self.rows
        return (2 + 6) * (self.body * places + self.head * self.sampled)

    def seconds(self, rate: float, *, shared: bool) -> float:
        """Return the least time.

        Args:
            rate: operations per second that a matrix product was measured to reach.
            shared: as for `flops`.
        """
        return self.flops(shared=shared) / rate


def head_flops(tokens: int, vocabulary: int, hidden: int) -> int:
    """Return the operations of the head, forward and backward: three products of the same size.

    Example:
        >>> head_flops(2, 3, 5)
        180
    """
    return 6 * tokens * vocabulary * hidden
