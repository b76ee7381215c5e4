"""Prepares the tests of a program: their assertions are counted, and all of them are called."""

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from drpo.rewards.sandboxed import COUNT, GENUINE, RUN

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_SETUPS = ("setUp", "tearDown", "setup", "teardown", "setup_method", "teardown_method", "setup_class", "teardown_class")


class UnusableError(ValueError):
    """The tests cannot be run; the message gives the reason."""


@dataclass(frozen=True)
class Prepared:
    """One test program.

    Args:
        source: its text, with calls of the sandbox's functions inserted: see `drpo.rewards.sandboxed`.
        asserts: whether it has any assertion.
        imports: the modules that it requires.
        wanted: the names that it uses but does not define: those of the tested program, and built-ins.
    """

    source: str
    asserts: bool
    imports: tuple[str, ...]
    wanted: frozenset[str]


def prepare(source: str, entry: str | None = None) -> Prepared:
    """Insert a count after every assertion of a test program, and calls of its test functions.

    An assertion is an `assert` of a non-constant, a call of `assert...`, `fail...` or `raises`, an `if` that raises, or
    a `try` that raises if its body did not. Functions `test...` and methods `test...` of classes `Test...` are called,
    `unittest.TestCase`s are run, and `check(candidate)` is called with the program's function.

    Args:
        source: Python.
        entry: the argument of `check`: a name, or an expression like `Solution().add`.

    Raises:
        UnusableError: not Python, or it uses an unsupported feature: fixtures, parameters, skips.

    Example:
        >>> prepare("assert add(1, 2) == 3").asserts, prepare("x = 1").asserts
        (True, False)
    """
    try:
        tree = ast.parse(source)
        imports = tuple(_imports(tree.body))
        calls = _calls(tree, entry)
        wanted = frozenset(_wanted([*tree.body, *calls]))
        counter = _Counter()
        counter.visit(tree)
        tree.body += calls
        return Prepared(ast.unparse(ast.fix_missing_locations(tree)), counter.asserts, imports, wanted)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, UnusableError):
            raise
        raise UnusableError(f"is not Python: {error}") from None


def _calls(tree: ast.Module, entry: str | None) -> list[ast.stmt]:
    """Return the statements that call the tests which the program only defines."""
    functions = [node for node in tree.body if isinstance(node, _Function)]
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    _refuse_unsupported([*functions, *classes])
    cases = [c for c in classes if any(ast.unparse(base).endswith("TestCase") for base in c.bases)]
    plain = [c for c in classes if c not in cases and c.name.startswith("Test")]
    tests = [f.name for f in functions if f.name.startswith("test") and not _called(tree, f.name)]
    tests += [f"{c.name}().{f.name}" for c in plain for f in _methods(c)]
    for node in [f for f in functions if f.name in tests] + [f for c in plain for f in _methods(c)]:
        _require_callable(node, is_method=node not in functions)
    if cases:
        tree.body = [node for node in tree.body if not _is_call(node, "unittest.main")]
    calls = []
    if tests or cases:
        calls.append(f"{RUN!r}([{', '.join(tests)}], [{', '.join(c.name for c in cases)}])")
    check = next((f for f in functions if f.name == "check" and _n_required(f) == 1), None)
    if check is not None and not _called(tree, "check"):
        if entry is None:
            raise UnusableError("defines check(candidate) and does not call it; give the problem's data an entry_point")
        calls.append(f"check({entry})")
    try:
        return [node for call in calls for node in ast.parse(call).body]
    except SyntaxError:
        raise UnusableError(f"cannot be called with entry_point {entry!r}, which is no expression") from None


def _refuse_unsupported(nodes: Sequence[_Function | ast.ClassDef]) -> None:
    inner = [node for c in nodes if isinstance(c, ast.ClassDef) for node in c.body if isinstance(node, _Function)]
    for node in [*nodes, *inner]:
        for decorator in node.decorator_list:
            text = ast.unparse(decorator)
            if any(word in text for word in ("fixture", "parametrize", "skip", "xfail", "expectedFailure")):
                raise UnusableError(f"decorates {node.name} with @{text.split('(')[0]}, which is not supported")


def _require_callable(node: _Function, is_method: bool) -> None:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)][int(is_method) :]
    if _n_required(node) > int(is_method):
        raise UnusableError(
            f"has a test {node.name}({', '.join(names)}), which takes arguments; "
            "fixtures and parameters are not supported"
        )
    if isinstance(node, ast.AsyncFunctionDef):
        raise UnusableError(f"has an asynchronous test {node.name}, which is not supported")


def _methods(node: ast.ClassDef) -> list[_Function]:
    functions = [f for f in node.body if isinstance(f, _Function)]
    tests = [f for f in functions if f.name.startswith("test")]
    for f in functions if tests else ():
        if f.name in _SETUPS:
            raise UnusableError(
                f"has a class {node.name} with {f.name}, which is not supported outside unittest.TestCase"
            )
    return tests


def _n_required(node: _Function) -> int:
    plain = len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)
    return plain + sum(default is None for default in node.args.kw_defaults)


def _called(tree: ast.Module, name: str) -> bool:
    """Whether running the program calls a function: outside all definitions, or as the entry."""
    outer = [node for node in tree.body if not isinstance(node, (*_Function.__args__, ast.ClassDef))]
    outer = [node for node in outer if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    inside = [n for node in outer for n in ast.walk(node)]
    return any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name for n in inside)


def _is_call(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == name


def _imports(body: Iterable[ast.stmt]) -> Iterable[str]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def _wanted(body: Iterable[ast.stmt]) -> Iterable[str]:
    nodes = [node for statement in body for node in ast.walk(statement)]
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    defined |= {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    yield from {n.id for n in nodes if isinstance(n, ast.Name)} - defined
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "solution":
            yield from (alias.name for alias in node.names)


class _Counter(ast.NodeTransformer):
    """Inserts a call after every assertion, and one around every compared value."""

    def __init__(self) -> None:
        self.asserts = False

    def visit(self, node: ast.AST) -> ast.AST:
        """Insert a count after each assertion in the node's blocks."""
        self.generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, [part for statement in block for part in self._counted(statement)])
        if isinstance(node, ast.Compare):
            node.left, node.comparators = _genuine(node.left), [_genuine(c) for c in node.comparators]
        if isinstance(node, ast.Call) and _asserts(node):
            node.args = [a if isinstance(a, ast.Starred) else _genuine(a) for a in node.args]
        return node

    def _counted(self, node: ast.AST) -> list[ast.AST]:
        if not _is_assertion(node):
            return [node]
        self.asserts = True
        return [node, ast.Expr(ast.Call(ast.Constant(COUNT), [], []))]


def _genuine(value: ast.expr) -> ast.expr:
    return value if isinstance(value, ast.Constant) else ast.Call(ast.Constant(GENUINE), [value], [])


def _is_assertion(node: ast.AST) -> bool:
    match node:
        case ast.Assert(test=ast.Constant(value=value)):
            return not value
        case ast.Assert(test=ast.Tuple(elts=[_, *_])):
            return False
        case ast.Assert():
            return True
        case ast.Expr(value=ast.Call() | ast.Await()):
            return _asserts(node.value)
        case ast.With() | ast.AsyncWith():
            return any(_asserts(item.context_expr) for item in node.items)
        case ast.If():
            return any(isinstance(inner, ast.Raise) for inner in (*node.body, *node.orelse))
        case ast.Try():
            inner = (*node.body, *node.orelse)
            return bool(node.handlers) and any(isinstance(i, ast.Raise) or _is_failure(i) for i in inner)
    return False


def _is_failure(node: ast.AST) -> bool:
    match node:
        case ast.Assert(test=ast.Constant(value=value)):
            return not value
        case ast.Expr(value=ast.Call()):
            return _name(node.value).startswith("fail")
    return False


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Await):
        return _asserts(node.value)
    name = _name(node)
    return name.startswith(("assert", "fail")) or name == "raises"


def _name(node: ast.AST) -> str:
    """Return the name of the called function, or ""."""
    function = node.func if isinstance(node, ast.Call) else None
    match function:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""
