"""A large run that nobody trained: records as the trainer writes them, every completion trained on: the worst case."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drpo.objectives import DRPO
from drpo.train.config import Run, configure, to_json
from drpo.train.records import CONFIG, METRICS, MODEL, ROLLOUTS
from drpo.types import Sampling

SAMPLES = 8
PROMPTS = 25
N_WORDS = 20_000
EOS = 0


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words of three to eight letters with the space before them, ids by frequency, 0 the EOS."""
    rng = np.random.default_rng(0)
    words = {"<eos>": EOS}
    while len(words) < N_WORDS:
        letters = rng.integers(97, 123, size=int(rng.integers(3, 9)))
        words.setdefault("\u0120" + bytes(letters.tolist()).decode(), len(words))
    backend = Tokenizer(
        models.BPE(
            vocab={**{c: N_WORDS + i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, **words},
            merges=[],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def write_large_run(folder: Path, completions: int, tokens: int, seed: int = 0) -> Run:
    """Write a run of `completions` of `tokens` tokens each, with a tokenizer of 20,000 words."""
    steps = completions // (SAMPLES * PROMPTS)
    run = configure(
        Run(),
        name="large",
        model="tiny",
        objective=DRPO(0.2),
        steps=steps,
        prompts=PROMPTS,
        sampling=Sampling(samples=SAMPLES, max_new_tokens=tokens),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder / MODEL)
    (folder / CONFIG).write_text(json.dumps(to_json(run)))
    rng = np.random.default_rng(seed)
    with (folder / ROLLOUTS).open("w") as out:
        for step in range(1, steps + 1):
            for problem in range(PROMPTS):
                out.writelines(json.dumps(r) + "\n" for r in _group(rng, tokenizer, step, problem, tokens))
    metrics = [
        {"step": s, "sampled_tokens": PROMPTS * SAMPLES * tokens, "reward_mean": 0.5} for s in range(1, steps + 1)
    ]
    (folder / METRICS).write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return run


def _group(rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, step: int, problem: int, tokens: int):
    """The records of a group, some right and some wrong; half of the tokens are nearly certain, half are not."""
    n_right = int(rng.integers(1, SAMPLES))
    rewards = rng.permutation([1.0] * n_right + [0.0] * (SAMPLES - n_right))
    shape = (SAMPLES, tokens)
    ids = np.minimum(rng.zipf(1.3, shape), N_WORDS - 1)
    ids[:, -1] = EOS
    certain = rng.random(shape) < 0.5
    behavior_logp = -np.where(certain, rng.exponential(0.02, shape), rng.exponential(2.0, shape)).astype(np.float32)
    moved = rng.normal(0, np.where(certain, 0.01, 0.15), shape).astype(np.float32)
    logp = np.minimum(behavior_logp + moved, np.float32(-1e-7))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    for i in range(SAMPLES):
        yield {
            "step": step,
            "prompt": f"Question {problem} of step {step}?",
            "answer": str(problem),
            "reward": float(rewards[i]),
            "failure": None,
            "problem": f"{step}-{problem}",
            "sample": i,
            "text": texts[i],
            "finish_reason": "stop",
            "version": step - 1,
            "prompt_ids": [1, 2, 3],
            "token_ids": ids[i].tolist(),
            "behavior_logp": [float(str(x)) for x in behavior_logp[i]],
            "update": 0,
            "advantage": float(np.float32(rewards[i] - rewards.mean())),
            "logp": [float(str(x)) for x in logp[i]],
        }
