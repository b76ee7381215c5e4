"""What each token id of a run stands for, as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from drpo.errors import InputError
from drpo.lazily import lazily
from drpo.spec import runs_code
from drpo.train.config import Run
from drpo.train.records import MODEL

loading = lazily("drpo.model.loading")  # which imports every model's code: seconds, and 200 MiB

_WORD_START = "\u2581"
"""How SentencePiece writes the space before a word, which decoding a token alone leaves out."""


@dataclass(frozen=True)
class Piece:
    """A token as text.

    Args:
        text: what it adds to a completion; U+FFFD where it is part of a character.
        special: whether it is a mark for the model (an EOS, say) and no part of the text.
    """

    text: str
    special: bool


def find_tokenizer(folder: Path, run: Run) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a run from this machine: the trained model's, else the initial one's; None without.

    A model that the run names as module:function is not imported for it.
    """
    exported = folder / MODEL
    if not exported.exists() and runs_code(run.model.name):
        return None
    if (exported / "tokenizer.json").is_file():
        return _read(exported)
    try:
        return loading.load_tokenizer(str(exported) if exported.exists() else run.model.name)
    except InputError:
        return None


def _read(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a folder with tokenizer.json, without the imports of `loading`; None if it is damaged."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (
        Exception
    ):  # whatever the file's content leads to: the library raises KeyError, TypeError and Exception itself
        return None


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Piece]:
    """Return each id as text.

    Args:
        tokenizer: of the run.
        ids: any; one that the tokenizer does not know is empty text.

    Example:
        >>> pieces(loading.load_tokenizer("tiny"), [0, 34])
        [Piece(text='<eos>', special=True), Piece(text='B', special=False)]
    """
    special = set(tokenizer.all_special_ids)
    texts = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [Piece(_spaced(text, name), i in special) for i, text, name in zip(ids, texts, names, strict=True)]


def _spaced(text: str, name: str | None) -> str:
    starts_word = name is not None and name.startswith(_WORD_START) and not text.startswith(" ")
    return f" {text}" if starts_word else text
