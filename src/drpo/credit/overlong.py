"""Rules about overlong completions, applied between rewards and credit: cut ones are masked, or length costs reward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from drpo.errors import InputError
from drpo.spec import Registry
from drpo.types import Episode, RewardResult, ScoredGroup

PART = "overlong"
"""Name of the penalty among the reward's parts."""

Overlong: TypeAlias = Callable[[Sequence[ScoredGroup], int], list[ScoredGroup]]
"""(groups, most tokens that an episode can have) -> the groups with penalties, or with masked episodes. Pure."""


def mask(groups: Sequence[ScoredGroup], limit: int) -> list[ScoredGroup]:
    """Mask the episodes that the token limit cut: they count in their group's advantages, and no token is trained.

    A cut answer is usually scored as wrong, whatever the reasoning before the cut was worth.

    Args:
        groups: the groups of a rollout.
        limit: unused.

    Source: overlong filtering, DAPO, arXiv 2503.14476, Section 3.4; TRL's `mask_truncated_completions`.
    """
    return [replace(g, masked=tuple(e for e in g.episodes if e.finish_reason == "length")) for g in groups]


@dataclass(frozen=True)
class Shaped:
    """Soft overlong punishment: the last `cache` tokens before the limit cost reward, more with each.

        R_length = 0                          where |y| <= L - C
                 = penalty (L - C - |y|) / C  where L - C < |y| <= L
                 = -penalty                   beyond

    It is added to the reward at the episode's last token, apart from what the task gave (`RewardResult.penalties`). The
    paper's rewards are 1 and -1, so that its penalty of 1 is half of what an answer is worth.

    Args:
        cache: C, tokens, >= 1; None is a fifth of the limit, the paper's 4096 of 20480.
        penalty: of an episode of L tokens, reward units, > 0.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> from drpo.spec import parse_spec
        >>> [parse_spec("shaped(4096)", REGISTRY).of(n, limit=20480) for n in (16384, 18432, 20480, 30000)]
        [0.0, -0.5, -1.0, -1.0]

    Source: DAPO, arXiv 2503.14476, Eq. 13.
    """

    cache: int | None = None
    penalty: float = 1.0

    def __post_init__(self) -> None:
        whole = self.cache is None or (type(self.cache) is int and self.cache >= 1)
        if not whole:
            raise InputError(f"overlong cache={self.cache!r}: must be a whole number of tokens >= 1")
        number = isinstance(self.penalty, int | float) and not isinstance(self.penalty, bool)
        if not (number and 0 < self.penalty < float("inf")):
            raise InputError(f"overlong penalty={self.penalty!r}: must be a number above 0")

    def __call__(self, groups: Sequence[ScoredGroup], limit: int) -> list[ScoredGroup]:
        return [replace(g, results=tuple(map(self._punished(limit), g.episodes, g.results))) for g in groups]

    def of(self, tokens: int, limit: int) -> float:
        """Return R_length of an episode.

        Args:
            tokens: |y|, that the model sampled in the episode.
            limit: L, the most that it can sample in one.
        """
        cache = self.cache or max(1, limit // 5)
        excess = tokens - (limit - cache)
        return -self.penalty * min(excess / cache, 1.0) if excess > 0 else 0.0

    def _punished(self, limit: int) -> Callable[[Episode, RewardResult], RewardResult]:
        def punished(episode: Episode, result: RewardResult) -> RewardResult:
            penalty, n = self.of(episode.n_sampled, limit), episode.n_sampled
            parts = {**result.parts, PART: penalty}
            if not (penalty and n):
                return replace(result, parts=parts)
            before = result.penalties or (0.0,) * n
            return replace(result, parts=parts, penalties=(*before[:-1], before[-1] + penalty))

        return punished


REGISTRY: Registry[Overlong] = Registry("overlong", {"mask": mask, "shaped": Shaped})
