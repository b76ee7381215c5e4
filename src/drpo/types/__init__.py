"""The records that flow through drpo, each complete when made: Problem -> Episode -> ScoredGroup -> Credit -> Batch.

One file per stage. Each name is imported from its file at first use: `sampling` and `problem`, which configurations and
rewards need, import no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drpo.types.problem import Failure, FailureKind, FinishReason, Message, Problem, RewardResult, Transcript
    from drpo.types.rollout import Episode, Generation, Key, Played, Request, ScoredGroup, TokenSequence, Unscored
    from drpo.types.routes import Routes
    from drpo.types.sampling import Sampling
    from drpo.types.tokens import TokenLoss, Tokens, TopK
    from drpo.types.training import Batch, Credit, CriticStats, Layout, MicroBatch, StepStats, TokenStats

__all__ = [
    "Batch",
    "Credit",
    "CriticStats",
    "Episode",
    "Failure",
    "FailureKind",
    "FinishReason",
    "Generation",
    "Key",
    "Layout",
    "Message",
    "MicroBatch",
    "Played",
    "Problem",
    "Request",
    "RewardResult",
    "Routes",
    "Sampling",
    "ScoredGroup",
    "StepStats",
    "TokenLoss",
    "TokenSequence",
    "TokenStats",
    "Tokens",
    "TopK",
    "Transcript",
    "Unscored",
]


def __getattr__(name: str) -> Any:
    for file in ("sampling", "problem", "tokens", "routes", "rollout", "training") if name in __all__ else ():
        names = vars(import_module(f"{__name__}.{file}"))
        if name in names:
            return names[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
