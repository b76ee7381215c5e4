"""Models as folders that every competitor can load, and twins of them whose completions never end early."""

import shutil
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from benchmarks.environments import HOME
from drpo.model import loading, smollm2
from drpo.model.names import SMOLLM2, TINY
from drpo.rollout.turn_ends import turn_end

NEVER = "<|never|>"


def folder(name: str, *, endless: bool = False) -> Path:
    """Return the folder of a model, made where it does not exist.

    Args:
        name: `SMOLLM2` or `TINY`.
        endless: ask for the twin, whose tokenizer, chat template and generation configuration name as end a token that
            the model has no logit for: no competitor can draw it, so every completion has all its tokens.
    """
    plain = smollm2.smollm2() if name == SMOLLM2 else _tiny()
    return _endless(plain, HOME / "models" / f"{name}-unending") if endless else plain


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
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token
    tokenizer.add_special_tokens({"eos_token": NEVER})
    if tokenizer.chat_template:  # whose end of an assistant's turn ends a completion too
        of_role = f"('{NEVER}' if message['role'] == 'assistant' else '{end}')"
        tokenizer.chat_template = tokenizer.chat_template.replace(f"'{end}'", of_role)
    assert turn_end(tokenizer) in (None, tokenizer.eos_token_id), tokenizer.chat_template
    tokenizer.save_pretrained(scratch)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=pad).save_pretrained(scratch)
    scratch.rename(done)
    return done
