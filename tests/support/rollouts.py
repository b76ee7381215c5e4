"""Engines as tests ask them: problems in, episodes out, in one list."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.model import loading
from drpo.rollout import Engine, EpisodeDriver, TransformersEngine
from drpo.train.setup import Components
from drpo.types import Episode, Key, Problem, Sampling


class Prompted:
    """An engine with a driver before it, and the model in training; everything else is the engine's own."""

    def __init__(
        self, engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.engine, self.trained = engine, model
        self.driver = EpisodeDriver.of(engine, model, tokenizer or loading.load_tokenizer("tiny"))

    def generate(self, problems: Sequence[Problem], sampling: Sampling, key: Key) -> list[Episode]:
        return [episode for group in self.driver.run(problems, sampling, key) for episode in group]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def transformers_engine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> Prompted:
    return Prompted(TransformersEngine(model, **options), model, tokenizer)


def with_engine(components: Components, engine: Engine) -> Components:
    return replace(components, driver=replace(components.driver, engine=engine))
