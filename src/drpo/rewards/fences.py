"""Selects the fenced block of a completion that is the program."""

import ast
import builtins
import re
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

_FENCE = re.compile(r"(?:[ \t]*<[^<>\n]*>)*[ \t]*(`{3,}|~{3,})[ \t]*([^`\n]*)")
_CLOSING = re.compile(r"\s*(`{3,}|~{3,})\s*(?:<[^<>\n]*>\s*)*")
_GLUED = re.compile(r"^([^`\n]*[^`\s])(`{3,}[ \t]*)$", re.MULTILINE)
_PYTHON = re.compile(r"[{.\s]*(python|py)[\d.]*(?![\w+#-])", re.IGNORECASE)
_THOUGHT = "</think>"
_DEFINES = ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign
_CALL = """

import ast, sys


def _value(word):
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


print({name}(*map(_value, sys.stdin.read().split())))
"""


def program(text: str, reads_input: bool = False, wanted: Collection[str] = ()) -> str:
    r"""Return the program in a completion.

    Only Python blocks count: by their language, or, without a language, if they define something. The program is the
    last block with a wanted name (with `reads_input`, the last block that reads input), else the last block that
    defines a function or a class, else the last block. Later examples, tests and outputs are ignored. Earlier blocks
    are added if the program uses their names, or if they have other wanted names. Text up to `</think>` is ignored. If
    there is no such block, the whole text is the program.

    A block closes at the first fence before which its code parses, so a fence inside a string does not close it. The
    last block may lack its closing fence. A fence may be at the end of a line, and tags (`<answer>`) may surround it.

    Args:
        text: the completion.
        reads_input: whether the problem requires a program that reads standard input. If the code only defines one
            function, a call is added: its arguments are the words of the input, parsed as literals, and its result is
            printed.
        wanted: the names that the tests use.

    Example:
        >>> program("First:\n```python\ndef f(): pass\n```\nSo:\n```python\nf()\n```\n")
        'def f(): pass\n'
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").rpartition(_THOUGHT)[2]
    text = _GLUED.sub(r"\1\n\2", text)
    fenced = list(_blocks(text.split("\n")))
    tagged = [b for b in fenced if b.python or (not b.language and b.definitions)]
    blocks = tagged or [b for b in fenced if not b.language]
    blocks = [b for b in blocks if b.tree is not None] or blocks[-1:]
    if not blocks:
        blocks = [_Block("", text)]
    meant = next((b for b in reversed(blocks) if b.made & set(wanted)), None) or _last(blocks, "definitions")
    meant = (reads_input and _last(blocks, "reads")) or meant or blocks[-1]
    code = "".join(b.code for b in _with_needed(blocks[: blocks.index(meant)], meant, wanted))
    return code + (_call_of(meant) if reads_input else "")


@dataclass(frozen=True, eq=False)
class _Block:
    """The code between two fences.

    Args:
        language: the rest of the opening fence's line.
        code: the lines, without their common indentation.
    """

    language: str
    code: str

    @property
    def python(self) -> bool:
        return _PYTHON.match(self.language) is not None

    @cached_property
    def tree(self) -> ast.Module | None:
        return _parsed(self.code)

    @cached_property
    def definitions(self) -> frozenset[str]:
        """Names of functions and classes at the block's outer level."""
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        return frozenset(node.name for node in self._body if isinstance(node, kinds))

    @cached_property
    def made(self) -> frozenset[str]:
        """Definitions, and names assigned at the outer level."""
        stored = {n.id for n in self._outer if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        return self.definitions | stored

    @cached_property
    def names(self) -> frozenset[str]:
        """Names defined, assigned or imported at the outer level."""
        imported = {(n.asname or n.name).split(".")[0] for n in self._outer if isinstance(n, ast.alias)}
        return self.made | imported

    @cached_property
    def used(self) -> frozenset[str]:
        """Names that the block reads but does not define."""
        nodes = ast.walk(self.tree) if self.tree else ()
        return frozenset(n.id for n in nodes if isinstance(n, ast.Name)) - self.names

    @cached_property
    def reads(self) -> bool:
        """Whether the block reads standard input."""
        nodes = list(ast.walk(self.tree)) if self.tree else []
        return "input" in self.used or any(isinstance(n, ast.Attribute) and n.attr == "stdin" for n in nodes)

    @property
    def _outer(self) -> Iterator[ast.AST]:
        return (n for node in self._body if not isinstance(node, ast.ClassDef) for n in ast.walk(node))

    @property
    def _body(self) -> list[ast.stmt]:
        return self.tree.body if self.tree else []


def _call_of(block: _Block) -> str:
    """Return a call of the block's only function, if the block has nothing but definitions; else ""."""
    body = block.tree.body if block.tree else []
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    only_defines = all(isinstance(node, _DEFINES) or _is_docstring(node) for node in body)
    return _CALL.format(name=names[0]) if len(names) == 1 and only_defines and not block.reads else ""


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _last(blocks: list[_Block], what: str) -> _Block | None:
    return next((b for b in reversed(blocks) if getattr(b, what)), None)


def _with_needed(before: list[_Block], meant: _Block, wanted: Collection[str]) -> list[_Block]:
    """Return the block, preceded by the earlier blocks that it or the tests require."""
    chosen, needed = [meant], {*meant.used, *wanted} - meant.names - set(dir(builtins))
    for block in reversed(before):
        if block.names & needed:
            chosen.insert(0, block)
            needed = (needed - block.names) | (block.used - set(dir(builtins)))
    return chosen


def _blocks(lines: list[str]) -> Iterator[_Block]:
    at = 0
    while at < len(lines):
        opening = _FENCE.fullmatch(lines[at])
        if opening is None:
            at += 1
            continue
        fence, language = opening[1], opening[2].strip()
        if not language and _ends_a_program(lines[:at]):  # the opening fence was in the prompt
            yield _Block("python", _joined(lines[:at]))
            at += 1
            continue
        end = _end(lines, at + 1, fence)
        yield _Block(language, _joined(lines[at + 1 : end]))
        at = end + 1


def _ends_a_program(lines: list[str]) -> bool:
    return not any(map(_FENCE.fullmatch, lines)) and bool(_Block("", _joined(lines)).definitions)


def _end(lines: list[str], start: int, fence: str) -> int:
    """Return a block's closing line: the first fence before which the code parses, else the first, else the end."""
    closing = [i for i in range(start, len(lines)) if _closes(lines[i], fence)]
    if not closing:
        return len(lines)
    return next((i for i in closing if _parsed(_joined(lines[start:i])) is not None), closing[0])


def _closes(line: str, fence: str) -> bool:
    closing = _CLOSING.fullmatch(line)
    return closing is not None and closing[1].startswith(fence)


def _joined(lines: list[str]) -> str:
    return textwrap.dedent("".join(f"{line}\n" for line in lines))


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
