"""How much the doctor looks at."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """The size of an examination.

    Args:
        prompts, samples, new_tokens: size of the probe batch.
        answers: number of problems on which the reward is tested.
        slow_too: run the slower checks too: another temperature, the exact divergence, a mixture's routing, gradients.
        longest: the largest `max_new_tokens` for which the signal check runs; it samples completions of full length.
    """

    prompts: int
    samples: int
    new_tokens: int
    answers: int
    slow_too: bool
    longest: int = 2**20


THOROUGH = Size(prompts=8, samples=8, new_tokens=32, answers=32, slow_too=True)
QUICK = Size(prompts=4, samples=8, new_tokens=32, answers=8, slow_too=False, longest=256)
