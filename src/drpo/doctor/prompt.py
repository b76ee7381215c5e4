"""The check of a prompt's form: the chat template, what it adds of its own, and where a turn ends."""

from collections.abc import Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from drpo.doctor.finding import Finding, Verdict
from drpo.rollout import encode_prompt
from drpo.rollout.chat_template import encode, render, unused_words
from drpo.types import Message, Problem

_SHOWN = 300
"""Characters of a default system message that are shown."""


def prompt(tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], problem: Problem) -> Finding:
    """What a chat template adds to a prompt, and whether a prompt begins with one BOS.

    Args:
        tokenizer: with the model's chat template, or without one.
        stop: ids of the tokens that end a turn.
        problem: one of the run's.
    """
    ids, bos = encode_prompt(tokenizer, problem).tolist(), tokenizer.bos_token_id
    n_bos = 0 if bos is None else len(list(takewhile(lambda i: i == bos, ids)))
    ends = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in stop)
    system = default_system(tokenizer)
    if not tokenizer.chat_template:
        form = "no chat template: the messages' texts, with blank lines between"
    elif system:
        cut = "" if len(system) <= _SHOWN else "..."
        form = f"by the chat template; without a system message it puts {system[:_SHOWN]!r}{cut} first"
    else:
        form = "by the chat template, which adds no system message"
    begins = f"; it begins with {tokenizer.bos_token!r}" if n_bos else ""
    verdict, advice = _verdict(tokenizer, n_bos)
    values = {"bos": n_bos, "default_system": len(system)}
    return Finding("prompt", verdict, f"{form}{begins}; a turn ends with {ends}", "BOS at most once", advice, values)


def _verdict(tokenizer: PreTrainedTokenizerBase, n_bos: int) -> tuple[Verdict, str]:
    bos = tokenizer.bos_token
    if n_bos > 1:
        return (
            "broken",
            f"{bos!r} stands {n_bos} times before a prompt: take it out of the chat template, or of the data",
        )
    if "strftime_now" in str(tokenizer.chat_template):
        return "note", (
            "the chat template may write the day's date: a resume on another day has other prompts; an argument of the "
            "template may fix it (--template.NAME VALUE)"
        )
    if (
        tokenizer.chat_template
        and bos is not None
        and not n_bos
        and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    ):
        return "note", f"the tokenizer puts {bos!r} before a text; the chat template, which is followed, does not"
    return "ok", ""


def default_system(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what a chat template says before the first message of a user, without special tokens; "" for nothing.

    It is what stands before a first message of a user, and not before a later one.

    Args:
        tokenizer: with a chat template, or without one.

    Example:
        >>> from drpo.model.loading import tiny
        >>> _, tokenizer = tiny()
        >>> turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
        >>> tokenizer.chat_template = "system: Be brief.\\n" + turns
        >>> default_system(tokenizer)
        'Be brief.'
    """
    if not tokenizer.chat_template:
        return ""
    words = unused_words([])
    first, answer, second = next(words), next(words), next(words)
    asked: list[Message] = [{"role": "user", "content": first}]
    answered: list[Message] = [*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": second}]
    try:
        text, said, _ = render(tokenizer, asked).partition(first)
        before = encode(tokenizer, text if said else "", {})
        later = encode(tokenizer, render(tokenizer, answered).partition(answer)[2].partition(second)[0], {})
    except Exception:  # a template is a program, which may raise anything
        return ""
    pairs = zip(reversed(before), reversed(later), strict=False)
    opening = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))  # of a user's turn
    inserted = str(tokenizer.decode(before[: len(before) - opening], skip_special_tokens=True))
    return inserted.strip().removeprefix("system").lstrip(":\n ")
