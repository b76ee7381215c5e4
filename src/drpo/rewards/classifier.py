"""A transformers sequence classifier as a reward model, in the trainer's own process."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from drpo.errors import InputError, nearest
from drpo.lazily import lazily
from drpo.rewards.contract import Score, ScoreError
from drpo.spec import import_named
from drpo.types import Problem, Transcript

hub = lazily("huggingface_hub")

Reads: TypeAlias = Literal["auto", "conversation", "pair", "completion"]
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Classifier:
    """Scores episodes with a sequence classifier: its one logit, or the probability of a label.

    The model is loaded once, in the trainer's process, and scores a rollout's episodes in batches, without gradient.
    Equal batches have equal scores. An episode of more tokens than the model reads has no score: nothing is cut.

    Args:
        model: folder or hub name, of a checkpoint in safetensors without code of its own.
        label: name of the label whose probability is the score; "" is for models of one logit.
        reads: conversation, all messages by the model's chat template; pair, the user's last message and the last turn;
            completion, the last turn alone; auto, conversation where there is a template, else pair.
        dtype: of the weights: float32, bfloat16, float16.
        device: cpu, cuda, ...; auto takes a GPU where there is one.
        batch: most episodes that go through the model at once.
        max_tokens: most tokens of an episode; 0 is the model's own limit.

    Raises:
        InputError: a value out of its range.
    """

    model: str
    label: str = ""
    reads: Reads = "auto"
    dtype: str = "float32"
    device: str = "auto"
    batch: int = 16
    max_tokens: int = 0

    in_process: ClassVar[bool] = True
    graded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.model:
            raise InputError("model: must be a folder or a hub name")
        for name, known in (("reads", get_args(Reads)), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"{name}={value!r}{nearest(value, known)}")
        if not 1 <= self.batch <= 4096:
            raise InputError(f"batch={self.batch}: must be from 1 to 4096")
        if self.max_tokens < 0:
            raise InputError(f"max_tokens={self.max_tokens}: must be 0 (the model's limit) or more")

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone: a loaded model does not travel."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def _loaded(self) -> Any:
        return import_named("drpo.rewards.classifier_model", "LoadedClassifier", "reward")(self)

    def start(self) -> None:
        """Load the model.

        Raises:
            InputError: there is no such folder, it cannot be loaded, or has no such label.
        """
        _require_there(self.model)
        _ = self._loaded

    def score_all(self, items: Sequence[tuple[Problem, Transcript]]) -> list[Score | ScoreError]:
        """Return the score of each episode, or why it has none."""
        scores: list[Score | ScoreError] = self._loaded.scores(items)
        return scores

    def __call__(self, problem: Problem, transcript: Transcript) -> Score:
        """Return the score of one episode.

        Raises:
            ScoreError: it has none.
        """
        (score,) = self.score_all([(problem, transcript)])
        if isinstance(score, ScoreError):
            raise score
        return score


def _require_there(name: str) -> None:
    """Raise where a path has no folder, or a name is none, before the hub is asked, which takes a minute to fail."""
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    cached = Path(hub.constants.HF_HUB_CACHE, f"models--{name}").is_dir()
    if not Path(name).is_dir() and (is_path or ("/" not in name and not cached)):
        raise InputError(
            f"classifier: model={name!r}: no such folder; give a sequence classifier's, or a hub id, owner/name"
        )
