"""A language with a long tail, a small model that speaks it, and two tasks: the tail is noise, or it carries meaning.

A text answers a cue, a class, with common and rare words in turn: one of `N_HEAD` common words, then one of `N_TAIL`
rare words by Zipf's law, so half of all tokens have a probability below 0.01. A quarter of the words follow the cue:
they are of its class. The others are of any class. The reward counts words of the cue's class at one kind of position
only; the words at the other kind are noise, which the gradient of every sample contains. The two tasks differ only in
that kind. They separate the effect of a trust region on rare tokens from its benefit.
"""

import os
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from drpo.errors import InputError
from drpo.model.smollm2 import cache_folder
from drpo.objectives import DRPO
from drpo.reductions import Horizon
from drpo.rewards import Reward, in_process
from drpo.seeds import derive
from drpo.spec import Registry, format_spec
from drpo.train.config import Run, configure
from drpo.train.optim import AdamW
from drpo.types import Problem, Sampling

N_CLASSES, N_HEAD, N_TAIL = 8, 32, 1984
PLACES = 8
"""Words of a text; it ends by length."""
HEED = 0.25
"""The share of words that follow the cue before training."""
MODEL = "tail_language:speaker"
_EOS, _CUES, _HEAD, _TAIL = 0, 1, 1 + N_CLASSES, 1 + N_CLASSES + N_HEAD
_VOCABULARY = _TAIL + N_TAIL

Kind = Literal["noise", "meaning"]
KINDS: tuple[Kind, ...] = ("noise", "meaning")


def word(token: int) -> str:
    """Return the text of a token: its kind and its number.

    Example:
        >>> word(1), word(9), word(41)
        ('q0', 'h0', 't0')
    """
    for letter, first in (("t", _TAIL), ("h", _HEAD), ("q", _CUES)):
        if token >= first:
            return f"{letter}{token - first}"
    return "<eos>"


def tail_probabilities() -> Tensor:
    """Return the Zipf-Mandelbrot distribution, [N_TAIL] float64; no rare word has a probability above 0.01.

    Example:
        >>> p = tail_probabilities()
        >>> bool(p.max() < 0.01), round(float(p.min()), 5)
        (True, 0.00016)
    """
    weights = 1 / (torch.arange(N_TAIL, dtype=torch.float64) + 100)
    return weights / weights.sum()


@dataclass(frozen=True)
class Tail:
    """The cue names a class; a word is right if it is at a counted position and its number is of that class.

    Args:
        kind: "noise" counts the positions of common words, the even ones; "meaning" counts those of rare words.

    Raises:
        InputError: another kind.

    Example:
        >>> problem = Tail("meaning").sample(1, step=0, seed=0)[0]
        >>> problem.prompt, problem.answer, Tail("meaning").reward(problem, "h0 t1 h1 t9 h2 t3 h3 t0")
        ('q1', 't mod 8 = 1', 0.5)
    """

    kind: Kind

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"tail: kind={self.kind!r} must be 'noise' or 'meaning'")

    @property
    def reward(self) -> Reward:
        """The share of counted positions with a right word."""
        return class_share

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw cues with replacement; see `Task.sample`."""
        rng = random.Random(derive("tail", seed, step))
        return [self._problem(f"{step}-{slot}", rng.randrange(N_CLASSES)) for slot in range(n)]

    def held_out(self, n: int) -> list[Problem]:
        """Return no problems: all classes are training problems.

        Raises:
            InputError: n is above 0.
        """
        if n:
            raise InputError(f"eval_problems={n}: the tail's tasks hold nothing out; set --eval-problems 0")
        return []

    def _problem(self, name: str, cue: int) -> Problem:
        letter = "h" if self.kind == "noise" else "t"
        answer = f"{letter} mod {N_CLASSES} = {cue}"
        return Problem.of_text(name, f"q{cue}", answer, data={"letter": letter, "cue": cue})


@in_process
def class_share(problem: Problem, text: str) -> float:
    """Score a text of `Tail`: the share of counted positions with a right word."""
    letter, cue = str(problem.data["letter"]), int(problem.data["cue"])
    counted = text.split()[0 if letter == "h" else 1 :: 2]
    return sum(w[0] == letter and int(w[1:]) % N_CLASSES == cue for w in counted) / (PLACES // 2)


def speaker() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a two-layer Llama that speaks the language; it is trained once, in seconds, and cached."""
    folder = cache_folder() / f"tail-{_VOCABULARY}-{PLACES}-3"
    if not (folder / "config.json").exists():
        _teach(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)
    return model.eval(), tokenizer


def _teach(folder: Path, steps: int = 500, rows: int = 32) -> None:
    """Train by maximum likelihood on texts of the language; at first all words follow the cue, to teach it."""
    generator = torch.Generator().manual_seed(derive("tail", "texts") % 2**63)
    model = _untaught()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        ids = _texts(rows, 1.0 if step < 0.6 * steps else HEED, generator)
        model(input_ids=ids, labels=ids.where(torch.arange(ids.shape[1]) > 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.eval().save_pretrained(scratch)
    _tokenizer().save_pretrained(scratch)
    try:
        scratch.rename(folder)
    except OSError:  # another process trained one too
        if not folder.exists():
            raise


def _texts(rows: int, heed: float, generator: torch.Generator) -> Tensor:
    """[rows, 1 + PLACES] token ids: a cue, then common and rare words in turn."""
    cue = torch.randint(N_CLASSES, (rows, 1), generator=generator)
    even = torch.full((N_HEAD,), 1 / N_HEAD, dtype=torch.float64)
    common, rare = (_words(p, cue, heed, generator) for p in (even, tail_probabilities()))
    return torch.cat([_CUES + cue, torch.stack([_HEAD + common, _TAIL + rare], dim=2).flatten(1)], dim=1)


def _words(p: Tensor, cue: Tensor, heed: float, generator: torch.Generator) -> Tensor:
    """[rows, PLACES / 2] numbers of words with probabilities p, moved into the cue's class where it is heeded."""
    shape = (len(cue), PLACES // 2)
    drawn = torch.multinomial(p, cue.numel() * shape[1], True, generator=generator).reshape(shape)
    heeded = torch.rand(shape, generator=generator) < heed
    return torch.where(heeded, drawn - drawn % N_CLASSES + cue, drawn)


def _untaught() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=_EOS,
        pad_token_id=_EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive("tail", "weights") % 2**63)
        return LlamaForCausalLM(config)


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel({word(i): i for i in range(_VOCABULARY)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def task_of(kind: Kind) -> str:
    """Return a task as configurations have it.

    Example:
        >>> task_of("noise")
        "tail_language:Tail('noise')"
    """
    return format_spec(Tail(kind), Registry("task", {}))


def base(kind: Kind) -> Run:
    """Return the run that the benchmark varies."""
    return configure(
        Run(),
        name=f"tail-{kind}",
        model=MODEL,
        task=Tail(kind),
        objective=DRPO(0.2),
        reduction=Horizon(PLACES),
        sampling=Sampling(samples=8, max_new_tokens=PLACES),
        steps=20,
        prompts=16,
        updates=4,
        optimizer=AdamW(1e-3),
        precision="fp32",
        rollout_precision="fp32",
        eval_problems=0,
        max_skipped=0,  # a divergence is a result
    )
