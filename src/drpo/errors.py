"""Exceptions with a message for the user, and helpers that format messages."""

import difflib
import errno
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # bidirectional control
    "\u2028\u2029"  # line and paragraph separators
    # Invisible characters, except the joiners (200c, 200d) and selectors (fe0e, fe0f) that scripts and emoji need.
    "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u2060-\u2065\u3164\ufe00-\ufe0d\ufeff\uffa0"
    "\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    "\ud800-\udfff]"  # surrogates, which cannot be encoded
)
_PLACEHOLDER = re.compile(r"[A-Z]+(\|[A-Z]+)*")
_LONGEST = 200  # letters of an error's description


class InputError(ValueError):
    """The user's input is invalid.

    The message is one line with the field, the value and the fix. The command line prints it and exits with status 2; a
    library caller receives an ordinary `ValueError`.
    """


class BrokenLogpError(InputError):
    """A sampler's log-probabilities are missing, not finite, or positive."""


class EngineError(RuntimeError):
    """The rollout engine failed; a fresh process may succeed."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run during work that a resumed run repeats.

    No `Exception`: a library, a template or a reward whose errors are caught must not catch it.
    """


def printable(text: str) -> str:
    """Replace unsafe characters by U+FFFD: control, bidi, separator, invisible and unencodable ones.

    Tabs and line breaks are kept. All output of a command passes through here.

    Example:
        >>> printable("red: \\x1b[31m")
        'red: \ufffd[31m'
    """
    return _CONTROL.sub("\ufffd", text)


def one_line(text: object) -> str:
    """Return an untrusted text, such as a name in a record, as one printable line.

    Example:
        >>> one_line("a\\n  b\\u2028c")
        'a b c'
    """
    return printable(" ".join(str(text).split()))


def as_typed(name: object) -> str:
    """Return a name, such as a path, as a shell reads it back: in quotes where it has a space, say.

    A placeholder of a usage, such as RUN|MODEL, stays as it is.

    Example:
        >>> as_typed("runs/demo"), as_typed("runs/my demo"), as_typed("RUN|MODEL")
        ('runs/demo', "'runs/my demo'", 'RUN|MODEL')
    """
    return str(name) if _PLACEHOLDER.fullmatch(str(name)) else shlex.quote(str(name))


def describe(error: BaseException) -> str:
    """Return an error as one line of at most 200 letters: its type and its message.

    Example:
        >>> describe(ValueError("bad\\n  news"))
        'ValueError: bad news'
    """
    name = type(error).__name__
    try:
        text = " ".join(f"{name}: {error}".split()).removesuffix(":")
    except Exception:  # an error's own __str__ may fail
        text = name
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


_MEMORY = re.compile(
    r"out of memory|(can't|cannot) allocate memory|can't start new thread|failed to map segment|os error 12\b",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library means that memory, address space or threads are exhausted.

    Example:
        >>> is_out_of_memory(RuntimeError("can't start new thread")), is_out_of_memory(RuntimeError("no"))
        (True, False)
    """
    return isinstance(error, MemoryError) or bool(_MEMORY.search(str(error)))


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's share of it, has no room left.

    Example:
        >>> is_disk_full(OSError(errno.ENOSPC, "No space left on device")), is_disk_full(OSError(errno.EIO, "I/O"))
        (True, False)
    """
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def message_of(error: BaseException) -> str:
    """Return what an error says to the user: its own words where they are meant for people, else with its type.

    Example:
        >>> message_of(InputError("steps=0: must be at least 1")), message_of(KeyError("x"))
        ('steps=0: must be at least 1', "KeyError: 'x'")
        >>> message_of(OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"))
        'run/metrics.jsonl: no space left on the disk; make room, then resume or try again'
    """
    if isinstance(error, InputError | EngineError | FloatingPointError) and str(error):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory ({error or 'no more is to be had'})"
    if not isinstance(error, OSError):
        return describe(error)
    if is_disk_full(error):
        return (
            f"{error.filename or 'a file of the run'}: no space left on the disk; make room, then resume or try again"
        )
    return f"{error.filename}: {error.strerror}" if error.filename else f"{type(error).__name__}: {error}"


def counted(n: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> counted(1, "step"), counted(4, "step")
        ('1 step', '4 steps')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'X'?"` for the known name nearest to `word`, else the list of known names.

    A name of the same letters, in another order or of another case, is the nearest.

    Example:
        >>> nearest("dropo", ["drpo", "ppo"]), nearest("GPRO", ["gspo", "grpo"])
        ("; did you mean 'drpo'?", "; did you mean 'grpo'?")
        >>> nearest("zzz", ["drpo", "ppo"])
        '; known: drpo, ppo'
    """
    names = list(known)
    turned = [name for name in names if sorted(name.casefold()) == sorted(word.casefold())]
    close = turned or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def nearest_path(path: Path) -> str:
    """Return why a path leads nowhere: a link dangles, the folder is missing, or a name is close; else "".

    Args:
        path: of no file and no folder.

    Example:
        >>> nearest_path(Path("/nowhere/my.jsonl"))
        '; the folder /nowhere does not exist'
    """
    if path.is_symlink():
        return f"; it is a link to {path.readlink()}, which is not there"
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist"
    hint = nearest(path.name, sorted(p.name for p in path.parent.iterdir()))
    return hint if "did you mean" in hint else ""
