"""Reads the tests of programs in the formats of data sets: asserts, outputs of programs, results of functions."""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, Literal

from drpo.errors import InputError
from drpo.rewards.assertions import Prepared, UnusableError, prepare
from drpo.types import Problem

_INPUT = ("inputs", "input")
_OUTPUT = ("outputs", "output", "expected_output")
_ENTRY = ("fn_name", "func_name", "entry_point")
_PROGRAMS = ("assert_case", "test_list", "functional", "test_code", "test", "tests")
_ROOM = 1 << 12  # extra bytes that an answer may have, for white space


@dataclass(frozen=True)
class Pair:
    """A test that compares an answer.

    Args:
        given: the program's input, or the function's arguments as a JSON list.
        expected: the program's output, or the function's return value.
    """

    given: str
    expected: Any


@dataclass(frozen=True)
class Suite:
    """All tests of a problem.

    Args:
        kind: "asserts": test programs that run after the tested program; "stdin": a program's output is compared;
            "call": a function's result is compared.
        programs: of "asserts".
        pairs: of the other two.
        entry: the function of "call".
    """

    kind: Literal["asserts", "stdin", "call"]
    programs: tuple[Prepared, ...] = ()
    pairs: tuple[Pair, ...] = ()
    entry: str = ""

    def __len__(self) -> int:
        """Return the number of tests."""
        return len(self.programs) + len(self.pairs)

    def jobs(self) -> list[Any]:
        """Return the tests as the sandbox receives them, without the right answers."""
        most = max(map(longest, self.pairs), default=0)  # one for all: else it reveals the answer's length
        return [{"input": p.given, "longest": most} for p in self.pairs] or [p.source for p in self.programs]

    def accepts(self, answer: str, pair: Pair) -> bool:
        """Whether an answer is right for the pair."""
        if self.kind == "stdin":
            return same_output(answer, pair.expected)
        return same_value(answer, pair.expected, self._wrapped)

    @property
    def wanted(self) -> frozenset[str]:
        """Names that the program must define."""
        return frozenset().union(*(p.wanted for p in self.programs), {self.entry, "Solution"} if self.entry else ())

    @property
    def _wrapped(self) -> bool:
        """Whether every expected value is a list of one value."""
        return all(isinstance(p.expected, list) and len(p.expected) == 1 for p in self.pairs)


def read_suite(problem: Problem, field: str = "tests") -> Suite:
    """Return a problem's tests, in any of the formats in docs/rewards.md.

    Args:
        problem: the tests are in its data, or in its answer if the data has no such field.
        field: the field of the data.

    Raises:
        InputError: there are no tests, their format is unknown, or they assert nothing.

    Example:
        >>> read_suite(Problem.of_text("0", "", '{"inputs": ["1 2"], "outputs": ["3"]}')).pairs
        (Pair(given='1 2', expected='3'),)
    """
    given = problem.data.get(field, problem.answer)
    where = f"problem {problem.id!r}: {field}"
    try:
        suite = _suite(_decoded(given), problem.data)
    except UnusableError as error:
        raise InputError(f"{where} {error}") from None
    if not suite:
        raise InputError(f"problem {problem.id!r}: python_tests needs tests, in data[{field!r}] or as the answer")
    if suite.kind == "stdin" and not any(pair.expected.strip() for pair in suite.pairs):
        raise InputError(f"{where} expects no output of any input, which tests nothing")
    return suite


def longest(pair: Pair) -> int:
    """Return the limit on an answer, in bytes, a power of two; a longer answer is wrong."""
    text = pair.expected if isinstance(pair.expected, str) else json.dumps(pair.expected)
    return 1 << (4 * len(text.encode(errors="replace")) + _ROOM).bit_length()


def same_output(printed: str, expected: str) -> bool:
    r"""Whether a program's output is right; ignores white space at line ends and compares numbers by value.

    Example:
        >>> same_output("1.50 yes \n\n", "1.5 yes"), same_output("1\n2", "1 2")
        (True, False)
    """
    ours, theirs = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (printed, expected))
    return ours == theirs or (len(ours) == len(theirs) and all(map(_same_line, ours, theirs)))


def same_value(returned: str, expected: Any, wrapped: bool = False) -> bool:
    """Whether a function's result is right.

    Args:
        returned: the result as JSON; tuples are lists.
        expected: the right value, from JSON too.
        wrapped: whether the data set wraps every value in a list of one, as APPS and TACO do.

    Example:
        >>> same_value("[1, 2]", (1, 2)), same_value("3", [3], wrapped=True), same_value("1", True)
        (True, True, False)
    """
    try:
        value = json.loads(returned)
        plain = json.loads(json.dumps(expected))
    except (ValueError, RecursionError):
        return False
    return _equal(value, plain) or (wrapped and _equal(value, plain[0]))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _same_line(a: str, b: str) -> bool:
    ours, theirs = a.split(), b.split()
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(a: str, b: str) -> bool:
    if a == b:
        return True
    try:
        return Decimal(a) == Decimal(b) and "_" not in a + b
    except InvalidOperation:
        return False


def _decoded(given: Any) -> Any:
    """Decode JSON or a Python literal, also if encoded repeatedly; return anything else unchanged."""
    for _ in range(3):
        if not isinstance(given, str) or not given.strip().startswith(("[", "{", '"', "'", "(")):
            break
        value = _literal(given)
        if not isinstance(value, str | list | tuple | Mapping):
            break
        given = value
    return given


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def _suite(given: Any, data: Mapping[str, Any]) -> Suite:
    if isinstance(given, str):
        return _asserts([given], data)
    if isinstance(given, Mapping):
        return _of_mapping(given, data)
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise UnusableError(f"is a {type(given).__name__}, not programs, inputs and outputs, or JSON of these")
    parts = [_decoded(part) for part in given]
    for i, part in enumerate(parts):
        if not isinstance(part, str | Mapping):
            raise UnusableError(f"[{i}] is a {type(part).__name__}, not a program's text or an object")
    if all(isinstance(part, str) for part in parts):
        return _asserts(parts, data)
    if not all(isinstance(part, Mapping) for part in parts):
        raise UnusableError("mixes programs and objects")
    return _joined([_of_mapping(part, data, listed=True) for part in parts])


def _joined(suites: Sequence[Suite]) -> Suite:
    """Merge suites into one."""
    if len({(s.kind, s.entry) for s in suites}) > 1:
        raise UnusableError("mixes kinds of tests, or functions")
    programs = tuple(p for s in suites for p in s.programs)
    return Suite(suites[0].kind, programs, tuple(p for s in suites for p in s.pairs), suites[0].entry)


def _of_mapping(given: Mapping[str, Any], data: Mapping[str, Any], listed: bool = False) -> Suite:
    if any(name in given for name in _INPUT):
        return _compared(given, data, listed)
    name = next((name for name in _PROGRAMS if name in given), None)
    if name is None:
        known = ", ".join((*_INPUT, *_PROGRAMS))
        raise UnusableError(f"has the fields {', '.join(map(str, given))}; known are {known}")
    return _suite(_decoded(given[name]), {**data, **given})


def _compared(given: Mapping[str, Any], data: Mapping[str, Any], listed: bool) -> Suite:
    """Read inputs and outputs of a program or a function; an element of a list of such objects has one input."""
    of_input = next(name for name in _INPUT if name in given)
    of_output = next((name for name in _OUTPUT if name in given), None)
    if of_output is None:
        raise UnusableError("has inputs and no outputs")
    inputs, outputs = given[of_input], given[of_output]
    kind = str(given.get("testtype", given.get("type", "")))
    entry = "" if "stdin" in kind else _entry(given) or _entry(data, _ENTRY[:2])
    if kind.startswith("func") and not entry:
        raise UnusableError("calls a function that has no name; give fn_name")
    if (of_input == "input" and (kind or listed)) or not (isinstance(inputs, list) and isinstance(outputs, list)):
        inputs, outputs = [inputs], [outputs]
    if len(inputs) != len(outputs):
        raise UnusableError(f"has {len(inputs)} inputs and {len(outputs)} outputs")
    make = _called if entry else _printed
    return Suite("call" if entry else "stdin", (), tuple(map(make, inputs, outputs)), entry)


def _printed(given: Any, expected: Any) -> Pair:
    return Pair(_lines(given, "input"), _lines(expected, "output"))


def _lines(value: Any, what: str) -> str:
    if isinstance(value, list):
        return "\n".join(_lines(part, what) for part in value)
    if isinstance(value, str | int | float):
        return str(value)
    raise UnusableError(f"has an {what} that is a {type(value).__name__}, not text; a function's tests need fn_name")


def _called(given: Any, expected: Any) -> Pair:
    """Read a call; if the arguments are text, each line is one argument in JSON, and the result is JSON too."""
    try:
        if isinstance(given, str):
            arguments = [json.loads(line) for line in given.split("\n") if line.strip()]
            value = json.loads(expected) if isinstance(expected, str) else expected
        else:
            arguments, value = given if isinstance(given, list) else [given], expected
        return Pair(json.dumps(arguments), json.loads(json.dumps(value)))
    except (ValueError, TypeError, RecursionError) as error:
        raise UnusableError(f"has arguments or a result of a function that are not JSON: {error}") from None


def _entry(data: Mapping[str, Any], names: Sequence[str] = _ENTRY) -> str:
    """Return the name of the tested function, from a row or the row's metadata."""
    metadata = data.get("metadata")
    metadata = _literal(metadata) if isinstance(metadata, str) else metadata
    for source in (data, metadata if isinstance(metadata, Mapping) else {}):
        for name in names:
            if isinstance(source.get(name), str) and source[name].strip():
                return str(source[name]).strip()
    return ""


def _asserts(programs: Sequence[str], data: Mapping[str, Any]) -> Suite:
    """Read test programs; a program without assertions is put before the next one with them."""
    setup = data.get("test_setup_code") or ""
    imports = data.get("test_imports") or []
    before = [*imports, setup] if isinstance(imports, list) and isinstance(setup, str) else []
    prepared: list[Prepared] = []
    for i, text in enumerate(programs):
        where = f"[{i}] " if len(programs) > 1 else ""
        try:
            before.append(text)
            one = _prepared("\n".join(before), _entry(data) or None)
        except UnusableError as error:
            raise UnusableError(f"{where}{error}") from None
        if one.asserts:
            prepared.append(one)
            before = []
    if not prepared and any(text.strip() for text in programs):
        raise UnusableError("has no assertion, which tests nothing")
    return Suite("asserts", tuple(prepared))


_prepared = lru_cache(maxsize=4096)(prepare)
