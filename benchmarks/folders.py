"""Models as folders that every competitor can load, and twins of them whose completions never end early."""

import shutil
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from benchmarks.environments import HOME
from drpo.model import loading, smollm2
from drpo.model.names import SMOLLM2, TINY

NEVER = "<|never|>"


def folder(name: str, *, endless: bool = False) -> Path:
    """Return the folder of a model, made where it does not exist.

    Args:
        name: `SMOLLM2` or `TINY`.
        endless: ask for the twin, whose tokenizer and generation configuration name as end of text a token that the
            model has no logit for: no competitor can draw it, so every completion has all its tokens.
    """
    plain = smollm2.smollm2() if name == SMOLLM2 else _tiny()
    return _endless(plain, HOME / "models" / f"{name}-endless") if endless else plain


def _tiny() -> Path:
    done = HOME / "models" / TINY
    if not done.exists():
        model, tokenizer = loading.tiny()
        model.save_pretrained(done)
        tokenizer.save_pretrained(done)
    return done


def _endless(plain: Path, done: Path) -> Path:
    if done.exists():
        return done
    scratch = done.with_suffix(".making")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    # Never through a link to the plain one, which is another's: save_pretrained would write there.
    for file in ("config.json", "model.safetensors"):
        shutil.copy(plain / file, scratch / file)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    pad = tokenizer.pad_token_id
    tokenizer.add_special_tokens({"eos_token": NEVER})
    tokenizer.save_pretrained(scratch)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=pad).save_pretrained(scratch)
    scratch.rename(done)
    return done
