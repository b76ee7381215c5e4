"""Which of a model's ways to decode return its own logits, tried on a few tokens."""

import logging
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.rollout.decode import Decoder, GroupDecoder, PlainDecoder
from drpo.rollout.fused import Step, fused_step
from drpo.rollout.temperatures import temper_by_position
from drpo.rollout.time_steps import limit_time_steps
from drpo.rollout.uncached import UncachedDecoder

log = logging.getLogger("drpo")

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest mean difference of the logits of grouped attention, or of the fused step, from the model's, in standard
deviations."""

REFUSED = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.3}
"""Largest mean difference of logits with and without a cache; in 16 bits a mixture may choose another expert."""

OTHERWISE = "sample with --engine vllm if vLLM knows the model"
"""What remains where this sampler does not do."""


class Way(Enum):
    """How a model is sampled from; the first that returns its own logits."""

    GROUPED = "shared prompts"
    """`GroupDecoder`."""
    PLAIN = "plain"
    """`PlainDecoder`."""
    UNCACHED = "without a cache"
    """`UncachedDecoder`."""


@torch.inference_mode()
def way_to_decode(model: PreTrainedModel, prompt: Tensor) -> Way:
    """Return the way to sample from a model, from comparisons on the end of a prompt with its logits without a cache.

    A model whose steps leave out the limits of its time steps gets them here (`limit_time_steps`), and one whose
    temperatures count padding is told its positions (`temper_by_position`).

    Args:
        model: the engine's own.
        prompt: [P] int64.

    Raises:
        InputError: the model does not read tokens alone, or not the same ones to the same logits.
    """
    text = prompt[-8:] if len(prompt) > 1 else prompt.repeat(2)  # two texts of different lengths
    prompts = [prompt[-1:], text]
    temper_by_position(model)
    try:
        expected = _uncached(model, prompts)
    except Exception as error:  # for example a model that requires other inputs than tokens
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{type(model).__name__} cannot be sampled from, token by token: {reason}; {OTHERWISE}"
        ) from None
    _limit_time_steps(model, prompts, expected)
    plain = _plain(model, prompts)
    if plain is not None and _gap(plain, expected) < REFUSED[plain.dtype]:
        return Way.GROUPED if _can_group(model, prompts, plain) else Way.PLAIN
    if (gap := _gap(_trial(UncachedDecoder(model, prompts, 2)), expected)) >= REFUSED[expected.dtype]:
        raise InputError(
            f"{type(model).__name__}: with other texts in its batch its logits differ by {gap:.1e} of their spread, so "
            f"what it samples would not be what is trained; {OTHERWISE}"
        )
    log.warning(
        "%s: transformers' cache does not hold its state between two tokens, so every token reads its whole text anew; "
        "keep completions short, or %s",
        type(model).__name__,
        OTHERWISE,
    )
    return Way.UNCACHED


def _limit_time_steps(model: PreTrainedModel, prompts: Sequence[Tensor], expected: Tensor) -> None:
    """Let steps keep the limits of their time steps, unless that changes the model's logits without a cache."""
    if (hooks := limit_time_steps(model)) and _gap(_uncached(model, prompts), expected) >= TOLERANCE[expected.dtype]:
        for hook in hooks:
            hook.remove()


def _plain(model: PreTrainedModel, prompts: Sequence[Tensor]) -> Tensor | None:
    """Return `PlainDecoder`'s logits; None if it does not run."""
    try:
        return _trial(PlainDecoder(model, prompts, 2))
    except Exception as error:  # a model with a cache of its own
        log.debug("%s does not run with transformers' cache: %s", type(model).__name__, error)
        return None


def _can_group(model: PreTrainedModel, prompts: Sequence[Tensor], plain: Tensor) -> bool:
    """Return whether `GroupDecoder` returns the logits of `PlainDecoder`."""
    try:
        grouped = _grouped(model, prompts)
    except Exception as error:  # a model that the grouped attention does not support
        log.debug("%s keeps its own attention: %s", type(model).__name__, error)
        return False
    gap = _gap(grouped, plain)
    log.debug("%s: grouped attention differs from its own by %.1e", type(model).__name__, gap)
    return gap < TOLERANCE[grouped.dtype]


@torch.inference_mode()
def can_continue(model: PreTrainedModel, prompt: Tensor) -> bool:
    """Return whether `GroupDecoder` returns the model's logits when it goes on with kept rows.

    Args:
        model: one whose way is `Way.GROUPED`.
        prompt: [P] int64; the comparison is on its end.
    """
    try:
        continued, expected = _continued_trial(model, [prompt[-1:], prompt[-8:]])
    except Exception as error:  # a model that reads one token of a row, but not several
        log.debug("%s reads every turn anew: %s", type(model).__name__, error)
        return False
    gap = _gap(continued, expected)
    log.debug("%s: logits of kept rows differ from its own by %.1e", type(model).__name__, gap)
    return gap < TOLERANCE[continued.dtype]


@torch.inference_mode()
def can_share_prefix(model: PreTrainedModel, prompt: Tensor) -> bool:
    """Return whether `GroupDecoder` returns the model's logits when it reads once what all prompts begin with.

    Args:
        model: one whose way is `Way.GROUPED`.
        prompt: [P] int64; the comparison is on its end.
    """
    prompts = [prompt[-8:-2], prompt[-8:]]
    try:
        shared = GroupDecoder.of_prompts(model, prompts, 1, prefix=3).logits
    except Exception as error:  # a model that goes on from a cache by one token alone
        log.debug("%s reads each prompt as a whole: %s", type(model).__name__, error)
        return False
    gap = _gap(shared, _last_logits(model, prompts))
    log.debug("%s: logits after a shared prefix differ from its own by %.1e", type(model).__name__, gap)
    return gap < TOLERANCE[shared.dtype]


@torch.inference_mode()
def can_fuse(model: PreTrainedModel) -> bool:
    """Return whether the model has a fused step, on a CPU, that returns the logits of its own.

    The tokens of the comparison are always the same, so that a resumed run decides alike.

    Args:
        model: the engine's own.
    """
    if model.device.type != "cpu" or (step := fused_step(model)) is None:
        return False
    vocab_size = model.get_input_embeddings().weight.shape[0]
    text = torch.arange(1, 9) * (vocab_size // 9)
    try:
        own = _grouped(model, [text[-1:], text])
    except Exception as error:  # a model that the grouped attention does not support
        log.debug("%s has no step to compare a fused one with: %s", type(model).__name__, error)
        return False
    try:
        gap = _gap(_grouped(model, [text[-1:], text], step), own)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("%s: the fused decoding step does not run (%s); its own is used", type(model).__name__, reason)
        return False
    if not gap < TOLERANCE[own.dtype]:
        log.warning(
            "%s: logits of the fused decoding step differ by %.1e of their spread from those of its own, which is used",
            type(model).__name__,
            gap,
        )
    return gap < TOLERANCE[own.dtype]


def _grouped(model: PreTrainedModel, prompts: Sequence[Tensor], step: Step | None = None) -> Tensor:
    return _trial(GroupDecoder.of_prompts(model, prompts, 2, fused=step))


def _gap(a: Tensor, b: Tensor) -> float:
    """Return the mean difference, in standard deviations of `b`."""
    return float((a - b).abs().mean() / b.std())


def _trial(decoder: Decoder) -> Tensor:
    """Return the logits of a few steps, with a row dropped in between."""
    steps = [decoder.logits]
    for _ in range(2):
        token = torch.arange(len(steps[-1]), device=steps[-1].device)
        steps.append(decoder.step(token))
    decoder.keep(torch.tensor([0, 2, 3], device=steps[-1].device))
    steps.append(decoder.step(token[:3]))
    return torch.cat(steps)


def _uncached(model: PreTrainedModel, prompts: Sequence[Tensor]) -> Tensor:
    """Return the logits expected from `_trial`, computed without a cache on whole, right-padded texts."""
    rows = [torch.cat([prompts[b // 2], torch.tensor([b, b, last])]) for b, last in enumerate((0, 0, 1, 2))]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    end = [len(row) - 4 for row in rows]  # the prompt's last token
    kept = [*((b, t) for t in range(3) for b in range(4)), *((b, 3) for b in (0, 2, 3))]
    return torch.stack([logits[b, end[b] + t] for b, t in kept])


def _continued_trial(model: PreTrainedModel, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits after the second and the third turn of a few rows, and those expected.

    The rows differ in their prompts, in what they sampled and in what they read next.
    """
    decoder = GroupDecoder.of_prompts(model, texts, 2)
    texts = [texts[b // 2] for b in range(4)]
    continued, expected = [], []
    for going in ({0: (3, 4), 2: (2, 3), 3: (1, 1)}, {1: (2, 2), 2: (3, 9)}):  # row -> tokens sampled, and read next
        for _ in range(2):
            decoder.step(torch.arange(len(texts), device=decoder.logits.device))
        rows = [decoder.cache.kept_row(row, sampled) for row, (sampled, _) in going.items()]
        further = [torch.arange(n) % 4 for _, n in going.values()]
        said = [torch.full((sampled - 1,), row) for row, (sampled, _) in going.items()]
        texts = [torch.cat([texts[row], *new]) for row, *new in zip(going, said, further, strict=True)]
        decoder = GroupDecoder.of_rows(model, rows, further)
        continued.append(decoder.logits)
        expected.append(_last_logits(model, texts))
    return torch.cat(continued), torch.cat(expected)


def _last_logits(model: PreTrainedModel, texts: Sequence[Tensor]) -> Tensor:
    """Return the logits after each text, computed without a cache on right-padded texts."""
    ids = nn.utils.rnn.pad_sequence(list(texts), batch_first=True).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.stack([logits[b, len(text) - 1] for b, text in enumerate(texts)])
