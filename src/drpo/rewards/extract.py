r"""Extracts a completion's answer: the last box or answer tag, else the text after "the answer is"."""

import re
from collections.abc import Iterator

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:(?P<brace>\{)|(?P<bare>[^\s{}$\\.,;]+))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_JOINT = re.compile(r"(?:\s|\$|\\[()\[\] ,;:!]|~|\\quad|\\text\s*\{|[{}*,&]|\band\b|\bor\b)*")
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
_STATED = re.compile(
    r"\b(?:answers?|(?:correct|right|best)\s+(?:option|choice))\b\W{0,4}(?:is|are|to this [a-z]+ is|:|=)?[\s:]*"
    r"(?P<answer>[^\n]*)",
    re.IGNORECASE,
)
_REASON = re.compile(
    r"[.;]\s|,\s+(?!(?:and|or)\b)(?=[A-Za-z]{2})|\s(?:because|since|as|which|where|so)\b|\s\((?!and\b|or\b|[A-J]\b)(?=[A-Za-z]{2}|[0-9])"
)
_MAX_BOXES = 1000


def boxed(text: str) -> str | None:
    r"""Return the content of a text's last box; boxes joined by "and", "or" or a comma count as one list.

    Args:
        text: a completion.

    Returns:
        The content without the box, or None if there is no complete box.

    Example:
        >>> boxed(r"\boxed{5}. Wait ... \boxed{\frac{1}{2}}"), boxed(r"\boxed {1} and \fbox{2}"), boxed(r"\boxed{5")
        ('\\frac{1}{2}', '1, 2', None)
    """
    boxes = list(_boxes(text))[-_MAX_BOXES:]
    if not boxes:
        return None
    start, _, content = boxes.pop()
    contents = [content]
    while boxes and _joins(text[boxes[-1][1] : start]):
        start, _, content = boxes.pop()
        contents.insert(0, content)
    return ", ".join(contents)


def _joins(between: str) -> bool:
    return len(between) < 80 and bool(re.search(r",|&|\band\b|\bor\b", between)) and bool(_JOINT.fullmatch(between))


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield start, end and content of the outermost complete boxes."""
    end = 0
    closing: dict[int, int] | None = None
    for match in _BOX.finditer(text):
        if match.start() < end:
            continue
        if match["bare"]:
            end = match.end()
            yield match.start(), end, match["bare"]
            continue
        closing = closing if closing is not None else _closing_braces(text)
        if (close := closing.get(match.start("brace"))) is not None:
            end = close + 1
            content = text[match.end() : close]
            yield match.start(), end, boxed(content) or content if content.lstrip().startswith("\\boxed") else content


def _closing_braces(text: str) -> dict[int, int]:
    """Return the position of each opening brace -> that of its closing brace."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            pairs[opened.pop()] = match.start()
    return pairs


def final_answer(text: str) -> str | None:
    r"""Return a text's marked answer: the last box, or the last answer tag if it comes later.

    Args:
        text: a completion.

    Returns:
        The content, or None if nothing is marked.

    Example:
        >>> final_answer(r"<think>\boxed{3}</think><answer>5</answer>"), final_answer("It is 5.")
        ('5', None)
    """
    tags = list(_TAG.finditer(text))
    if not tags:
        return boxed(text)
    after = boxed(text[tags[-1].end() :])
    if after is not None:
        return after
    inside = boxed(tags[-1][1])
    return tags[-1][1].strip() if inside is None else inside


def stated(text: str) -> str:
    """Return the rest of the line after the last "answer is" or "answer:"; without one, the last line.

    Example:
        >>> stated("So the answer is C. \\n"), stated("It follows.\\n\\n**East**")
        ('C.', '**East**')
    """
    answers = [m["answer"].strip() for m in _STATED.finditer(text)]
    lines = text.strip().splitlines()
    return next((answer for answer in reversed(answers) if answer.strip("*_ ")), lines[-1].strip() if lines else "")


def without_reason(answer: str) -> str:
    """Return a stated answer without the next sentence or a reason given for it.

    Example:
        >>> without_reason("2, as 2 + 2 = 4."), without_reason("C because it is"), without_reason("1, 2 and 3.")
        ('2', 'C', '1, 2 and 3.')
    """
    return _REASON.split(answer, maxsplit=1)[0]


def says_answer(text: str) -> bool:
    """Whether a text announces an answer in words.

    Example:
        >>> says_answer("The answer is 5."), says_answer("x = 5")
        (True, False)
    """
    return _STATED.search(text) is not None
