"""A loaded sequence classifier: episodes -> token ids -> batches -> scores."""

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from drpo.errors import InputError, describe, nearest
from drpo.rewards.classifier import Classifier
from drpo.rewards.contract import Score, ScoreError
from drpo.types import Problem, Transcript

_NO_LIMIT = 10**9
"""Tokenizers that know no limit report 1e30."""


class LoadedClassifier:
    """The model and tokenizer of a classifier.

    Args:
        config: which.

    Raises:
        InputError: there is no such model, it has no head, or no such label.
    """

    def __init__(self, config: Classifier) -> None:
        self._config = config
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
            self._model, info = AutoModelForSequenceClassification.from_pretrained(
                config.model,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=getattr(torch, config.dtype),
                output_loading_info=True,
            )
        except Exception as error:  # of many kinds
            raise InputError(f"classifier: model={config.model!r} cannot be loaded: {describe(error)}") from None
        if missing := sorted(info["missing_keys"]):
            raise InputError(
                f"classifier: model={config.model!r} has no trained {missing[0]}, so it is no sequence classifier"
            )
        device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        try:
            self._model.eval().requires_grad_(False).to(device)
        except RuntimeError as error:
            raise InputError(f"classifier: device={config.device!r}: {describe(error)}") from None
        self._label = _label(config, self._model.config)
        self._limit = config.max_tokens or min(
            int(getattr(self._model.config, "max_position_embeddings", None) or _NO_LIMIT),
            self._tokenizer.model_max_length,
        )
        self._pad = self._model.config.pad_token_id

    def scores(self, items: Sequence[tuple[Problem, Transcript]]) -> list[Score | ScoreError]:
        """Return the score of each episode, in order, or why it has none."""
        texts = [self._encoded(problem, transcript) for problem, transcript in items]
        scores: dict[int, Score | ScoreError] = {}
        for i, ids in enumerate(texts):
            if len(ids) > self._limit:
                scores[i] = ScoreError("raised", f"{len(ids)} tokens, more than the {self._limit} that the model reads")
            elif not ids:
                scores[i] = ScoreError("raised", "no token to read")
        for batch in self._batches({i: ids for i, ids in enumerate(texts) if i not in scores}):
            scores |= zip(batch, self._forward([texts[i] for i in batch]), strict=True)
        return [scores[i] for i in range(len(items))]

    def _encoded(self, problem: Problem, transcript: Transcript) -> list[int]:
        reads = self._config.reads
        if reads == "auto":
            reads = "conversation" if self._tokenizer.chat_template else "pair"
        if reads == "conversation":
            ids = self._tokenizer.apply_chat_template([dict(m) for m in transcript.messages], return_dict=False)
        elif reads == "pair":
            ids = self._tokenizer(problem.prompt, transcript.text)["input_ids"]
        else:
            ids = self._tokenizer(transcript.text)["input_ids"]
        return list(ids)

    def _batches(self, texts: dict[int, list[int]]) -> Iterator[list[int]]:
        """Yield places of texts for the model at once, of similar length; of equal length where padding could be text.

        A decoder's head reads the last token that is not padding, and would skip a text's own.
        """
        padded = self._pad is not None and not any(self._pad in ids for ids in texts.values())
        size = 1 if self._pad is None else self._config.batch
        places = sorted(texts, key=lambda i: (len(texts[i]), i))
        for _, alike in groupby(places, key=lambda i: 0 if padded else len(texts[i])):
            while batch := list(islice(alike, size)):
                yield batch

    @torch.inference_mode()
    def _forward(self, texts: Sequence[list[int]]) -> list[float]:
        n = max(map(len, texts))
        pad = self._pad or 0
        ids = torch.tensor([text + [pad] * (n - len(text)) for text in texts], device=self._model.device)
        mask = torch.tensor([[1] * len(text) + [0] * (n - len(text)) for text in texts], device=self._model.device)
        logits: Tensor = self._model(input_ids=ids, attention_mask=mask).logits.float()
        values = logits[:, 0] if self._label is None else logits.softmax(-1)[:, self._label]
        return [float(value) for value in values]


def _label(config: Classifier, model: Any) -> int | None:
    """Return the number of the label; None for a model of one logit.

    Raises:
        InputError: there is no such label, or one is missing.
    """
    names = {str(name): int(i) for i, name in model.id2label.items()}
    if model.num_labels == 1 and not config.label:
        return None
    if config.label not in names:
        found = nearest(config.label, names) if config.label else f": must be one of {', '.join(names)}"
        raise InputError(f"classifier: label={config.label!r}{found}")
    return names[config.label]
