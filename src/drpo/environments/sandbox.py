"""A tool that runs the model's Python, in the sandbox of the code rewards."""

from drpo.rewards.python import PythonTests, output_of

_LIMITS = PythonTests(seconds=5.0, memory_mb=1024, file_mb=16)
_MOST_BYTES = 4000

_RUNNER = """
import ast, linecache, os, sys, traceback

source = {source!r}
os.dup2(1, 2)
sys.stderr = sys.stdout
linecache.cache["program.py"] = (len(source), None, source.splitlines(True), "program.py")
names = {{"__name__": "__main__"}}
try:
    tree = ast.parse(source, "program.py")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "program.py", "exec"), names)
    value = None if last is None else eval(compile(ast.Expression(last.value), "program.py", "eval"), names)
    if value is not None:
        print(repr(value))
except SystemExit:
    pass
except SyntaxError as error:
    traceback.print_exception(type(error), error, None)
except BaseException as error:
    traceback.print_exception(type(error), error, error.__traceback__.tb_next)
"""


def python(code: str) -> str:
    """Run a Python program and return what it prints, and its traceback if it fails.

    The value of a last line that is an expression is printed too. Every call starts anew: no variable or file is kept.
    There is no network. A program may run for 5 seconds.

    Args:
        code: the program.

    Returns:
        What it prints, cut after 4,000 bytes.
    """
    output = output_of(_RUNNER.format(source=code), _LIMITS, _MOST_BYTES + 1, "tool python")
    if output is None:
        return f"Error: the program did not end; it may take {_LIMITS.seconds:g} seconds and {_LIMITS.memory_mb:,} MiB"
    if len(output.encode()) > _MOST_BYTES:
        return f"{output.encode()[:_MOST_BYTES].decode(errors='ignore')}... (cut: more than {_MOST_BYTES:,} bytes)"
    return output or "(nothing was printed)"
