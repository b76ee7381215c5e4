"""Tests of programs in the forms of public data sets: each is really run, and what tests nothing is an error."""

# ruff: noqa: E501 (tables of programs)

import json
import os
import time
from pathlib import Path

import pytest

from drpo.errors import InputError
from drpo.rewards import PythonTests
from drpo.rewards.assertions import prepare
from drpo.rewards.fences import program
from drpo.rewards.suites import read_suite, same_output, same_value
from drpo.types import Problem

CASES = Path(os.environ.get("DRPO_SHARED", Path(__file__).parents[2] / "shared")) / "cases"
ADD, WRONG = "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return 0\n"
SUM, NO_SUM = "a, b = map(int, input().split())\nprint(a + b)\n", "print(0)\n"
UNITTEST = """
import unittest
class TestCases(unittest.TestCase):
    @classmethod
    def setUpClass(cls): cls.two = 2
    def setUp(self): self.one = 1
    def test_one(self): self.assertEqual(add(self.one, self.two), 3)
    def test_wrong(self):
        with self.assertRaises(TypeError): add(1)
"""


def marked(tests, code, data=None, **settings):
    """A score; the time suffices on the busiest machine."""
    settings = {"seconds": 60.0, "isolated": False, **settings}
    return PythonTests(**settings)(Problem.of_text("7", "", "", data={"tests": tests, **(data or {})}), code)


FORMS = {
    "asserts in one program": ("assert add(1, 2) == 3\nassert add(2, 2) == 4", {}),
    "a list, as MBPP has it": (["import math", "assert add(1, math.floor(2.5)) == 3"], {}),
    "with MBPP's setup": (["assert add(ONE, floor(2)) == 3"], {"test_setup_code": "ONE = 1", "test_imports": ["from math import floor"]}),
    "JSON of a list": (json.dumps(["assert add(1, 2) == 3"]), {}),
    "JSON twice": (json.dumps(json.dumps(["assert add(1, 2) == 3"])), {}),
    "a list of Python": (repr(["assert add(1, 2) == 3"]), {}),
    "HumanEval": ("METADATA = {}\ndef check(candidate):\n    assert candidate(1, 2) == 3\n", {"entry_point": "add"}),
    "HumanEval's row": ({"test": "def check(candidate):\n    assert candidate(1, 2) == 3\n", "entry_point": "add"}, {}),
    "HumanEval, called": ("def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)", {}),
    "unittest": (UNITTEST, {}),
    "unittest, by itself": (UNITTEST + "unittest.main()\n", {}),
    "pytest's functions": ("from solution import add\ndef test_one():\n    assert add(1, 2) == 3\ndef test_two():\n    assert add(2, 2) == 4", {}),
    "pytest's classes": ("class TestAdd:\n    def test_one(self):\n        assert add(1, 2) == 3", {}),
    "a raise": ("if add(1, 2) != 3:\n    raise ValueError", {}),
    "must raise": ("try:\n    add(1)\n    assert False\nexcept TypeError:\n    pass\nassert add(1, 2) == 3", {}),
    "APPS with a function": ({"fn_name": "add", "inputs": [[1, 2], [2, 2]], "outputs": [[3], [4]]}, {}),
    "APPS with a method": (json.dumps({"fn_name": "plus", "inputs": [[1, 2]], "outputs": [3]}), {}),
    "LiveCodeBench, a function": ([{"input": "1\n2", "output": "3", "testtype": "functional"}], {"metadata": '{"func_name": "add"}'}),
    "arguments and results": ([{"type": "function_call", "fn_name": "add", "input": [[1], [2]], "output": [1, 2]}], {}),
    "APPS": ({"inputs": ["1 2\n", "2 2\n"], "outputs": ["3\n", "4"]}, {}),
    "APPS as JSON, in lines": (json.dumps({"inputs": [["1 2", ""]], "outputs": [["3"]]}), {}),
    "input and output": ({"input": ["1 2"], "output": ["3"]}, {}),
    "LiveCodeBench": (json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]), {}),
    "one pair": ({"input": "1 2", "output": 3}, {}),
}  # fmt: skip


SPELLINGS = (
    ("JSON of a list", "JSON twice", "a list of Python"),
    ("input and output", "LiveCodeBench", "one pair"),
)
"""Forms that are the same tests, of which the first is run by default."""
OTHERS = {form for _, *others in SPELLINGS for form in others}


def suite_of(form):
    tests, data = FORMS[form]
    return read_suite(Problem.of_text("7", "", "", data={"tests": tests, **data}))


@pytest.mark.parametrize("forms", SPELLINGS, ids=lambda forms: forms[0])
def test_other_spellings_are_the_same_tests(forms):
    assert len({repr(suite_of(form)) for form in forms}) == len(suite_of(forms[0])) == 1


@pytest.mark.parametrize("form", [pytest.param(f, marks=[pytest.mark.slow] * (f in OTHERS)) for f in FORMS])
def test_every_form_is_run(form):
    tests, data = FORMS[form]
    reads = suite_of(form).kind == "stdin"
    right, wrong = (
        (SUM, NO_SUM) if reads else (ADD + "class Solution:\n    def plus(self, a, b): return a + b\n", WRONG)
    )
    assert marked(tests, right, data) == 1.0
    assert marked(tests, wrong, data) == 0.0


def test_the_cases_that_were_found_pay_the_right_program_or_are_refused():
    file = CASES / "code_tests.jsonl"
    if not file.exists():
        pytest.skip("needs the shared cases")
    for case in map(json.loads, filter(str.strip, file.read_text().splitlines())):
        scores = []
        for text in (case["right"], case["wrong"]):
            try:
                scores.append(marked(case["tests"], text))
            except InputError as refused:
                assert "problem '7'" in str(refused)
        assert scores in ([], [1.0, 0.0]), case["name"]


@pytest.mark.parametrize(
    ("tests", "data", "message"),
    [
        ("x = 1", {}, "tests has no assertion"),
        ("assert True", {}, "tests has no assertion"),
        ("assert (add(1, 2) == 4, 'message')", {}, "tests has no assertion"),
        (["x = 1", "y = 2"], {}, "tests has no assertion"),
        ("print(add(1, 2) == 3)", {}, "tests has no assertion"),
        ("def check(candidate):\n    assert candidate(1) == 1", {}, r"check\(candidate\) and does not call it"),
        ("def check(candidate):\n    assert candidate(1) == 1", {"entry_point": "a b"}, "no expression"),
        ("import pytest\n@pytest.fixture\ndef x(): return 1\ndef test_a(x):\n    assert add(x, 2) == 3", {}, "@pytest.fixture"),
        ("def test_a(tmp_path):\n    assert add(1, 2) == 3", {}, r"test_a\(tmp_path\), which takes arguments"),
        ("import pytest\n@pytest.mark.parametrize('a', [1])\ndef test_a(a):\n    assert add(a, 2) == 3", {}, "parametrize"),
        ("class TestA:\n    def setup_method(self): pass\n    def test_a(self):\n        assert add(1, 2) == 3", {}, "setup_method"),
        ("async def test_a():\n    assert add(1, 2) == 3", {}, "asynchronous"),
        ({"inputs": ["1 2"], "outputs": []}, {}, "1 inputs and 0 outputs"),
        ({"inputs": ["1 2"]}, {}, "has inputs and no outputs"),
        ({"inputs": [], "outputs": []}, {}, "needs tests"),
        ({"inputs": ["1", "2"], "outputs": ["", " \n"]}, {}, "expects no output"),
        ({"inputs": [{"a": 1}], "outputs": ["1"]}, {}, "not text; a function's tests need fn_name"),
        ({"fn_name": "add", "inputs": ["1\nx"], "outputs": ["3"]}, {}, "not JSON"),
        ([{"input": "1", "output": "3", "testtype": "functional"}], {}, "no name"),
        ({"cases": []}, {}, "has the fields cases; known are"),
        ([["1", "2"]], {}, r"\[0\] is a list"),
        (["assert add(1, 2) == 3", {"input": "1", "output": "2"}], {}, "mixes"),
        ([], {}, "needs tests"),
        (7, {}, "is a int, not"),
        ("eJxVjTEKwzAQBL9yXK0i", {}, "tests has no assertion"),
    ],
)  # fmt: skip
def test_what_tests_nothing_or_is_not_known_is_an_error(tests, data, message):
    with pytest.raises(InputError, match=f"problem '7': .*{message}"):
        marked(tests, ADD, data)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("for x in []:\n    assert add(x, 1) == 2", "test 0 came to its end without executing an assertion"),
        ("def run_all():\n    assert add(1, 2) == 3", "without executing an assertion"),
        ("if __name__ == '__main__':\n    assert add(1, 2) == 3", "without executing an assertion"),
        ("def add(a, b):\n    return a + b\nassert add(1, 2) == 3", "an empty program passes"),
        ("try:\n    assert add(1, 2) == 4\nexcept BaseException:\n    pass\nassert len('a') == 1", "an empty program passes"),
        ("import no_such_module_of_ours\nassert add(1, 2) == 3", "cannot be run: ModuleNotFoundError"),
        ("assert add(1, 2) == 3\nreturn", "cannot be run: SyntaxError"),
    ],
)  # fmt: skip
def test_what_shows_only_when_it_runs_is_an_error_too(tests, message):
    with pytest.raises(InputError, match=f"problem '7': .*{message}"):
        marked(tests, ADD)


def test_many_tests_and_much_output_arrive():
    many = ["assert add(1, 2) == 3"] * 12_000
    assert marked([*many[1:], "assert add(1, 2) == 4"], ADD, partial=True) == pytest.approx(1 - 1 / 12_000)
    long = {"input": "x" * 300_000, "output": "\u00e9" * 300_000}
    assert marked(long, "print('\u00e9' * len(input()))") == 1.0


def test_a_program_is_a_whole_one():
    def printed(code, **settings):
        return marked({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}, code, **settings)

    assert (
        printed(
            f"import sys\ndef main():\n    {SUM.splitlines()[0]}\n    print(a + b)\n    sys.exit()\nif __name__ == '__main__':\n    main()\n"
        )
        == 1.0
    )
    assert (
        printed("import os\na, b = map(int, os.read(0, 99).split())\nos.write(1, b'%d' % (a + b))\nos._exit(0)") == 1.0
    )
    assert (
        printed(
            "import sys, atexit\na, b = map(int, sys.stdin.buffer.read().split())\natexit.register(lambda: print(a + b))"
        )
        == 1.0
    )
    assert (
        printed(
            "import threading\ndef f():\n"
            + "".join(f"    {x}\n" for x in SUM.splitlines())
            + "threading.Thread(target=f).start()"
        )
        == 1.0
    )
    assert printed(SUM + "1 / 0") == printed("print(3)") == printed(SUM + "print()\nprint(1)") == 0.0
    assert printed("print(3)", partial=True) == 0.5
    assert (
        printed("print(3)\nif '3' in input():\n    while True: pass", partial=True, seconds=1.0) == 0.5
    )  # the first is safe


def test_answers_are_compared_as_benchmarks_do():
    assert same_output("1  \n2\n\n", "1\n2") and same_output("0.50 x", "0.5 x") and same_output("1e3\r\n", "1000")
    for other in ("1\n\n2", "12", "1 2", "", "1\n2\n3", "1\n3"):
        assert not same_output(other, "1\n2")
    assert same_value("[1, [2.0]]", (1, [2])) and same_value('{"1": 2}', {1: 2}) and same_value("[3]", [3])
    for found, expected in (
        ("true", 1),
        ("1", True),
        ('"1"', 1),
        ("[1]", 1),
        ("1", [1, 2]),
        ("NaN", float("nan")),
        ("x", 1),
    ):
        assert not same_value(found, expected)


TRACE = """
import sys
import time
def jump(frame, event, argument):
    if event == 'line' and frame.f_code.co_filename == 'test.py' and frame.f_lineno == 2:
        frame.f_lineno = 3
    return jump
"""
CHEATS = {
    "trace": TRACE + "sys.settrace(jump)\ndef add(a, b): return 0",
    "trace from inside": TRACE + "def add(a, b):\n    sys._getframe(1).f_trace = jump\n    sys.settrace(jump)\n    return 0",
    "trace of threads": TRACE + "import threading\nthreading.settrace(jump)\nsys.setprofile(jump)\ndef add(a, b): return 0",
    "trace in C": "import ctypes\nctypes.pythonapi.PyEval_SetTrace(ctypes.c_void_p(1), None)\ndef add(a, b): return 0",
    "equal to anything": "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
    "a number equal to anything": "class Any(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
    "errors are none": "import builtins\nbuiltins.AssertionError = int\ndef add(a, b): return 0",
    "leave": "import os\ndef add(a, b): os._exit(0)",
    "SystemExit": "def add(a, b): raise SystemExit(0)",
    "SkipTest": "import unittest\ndef add(a, b): raise unittest.SkipTest",
    "no check": "def check(candidate): pass\ndef add(a, b):\n    globals()['check'] = lambda *a: None\n    return 0",
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 0",
    "assertions of unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef add(a, b): return 0",
    "isclose": "import math\nmath.isclose = lambda *a, **k: True\ndef add(a, b): return 0",
    "as good as true": "class Any:\n    def __eq__(self, other): return 1\ndef add(a, b): return Any()",
    "never different": "class Any:\n    def __ne__(self, other): return False\ndef add(a, b): return Any()",
    "code of unittest": "import unittest\nunittest.TestCase.assertEqual.__code__ = (lambda self, first, second, msg=None: None).__code__\n"
    "def add(a, b): return 0",
    "contexts of unittest": "import unittest.case\nunittest.case._AssertRaisesContext.__exit__ = lambda *a: True\ndef add(a, b): return 0",
    "objects of the harness": "import gc\nfor o in gc.get_objects():\n    if callable(o) and getattr(o, '__name__', '') == 'genuine':\n"
    "        o.__code__ = (lambda value: 3).__code__\ndef add(a, b): return 0",
}  # fmt: skip
UNTRICKED = {
    "asserts": ("x = add(1, 2)\nassert x == 3\ny = 1", {}),
    "check": ("def check(f):\n    x = f(1, 2)\n    assert x == 3\n    y = 1\n", {"entry_point": "add"}),
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertEqual(add(1, 2), 3)",
        {},
    ),
    "isclose": ("import math\nassert math.isclose(add(1, 2), 3)", {}),
    "different": ("assert not add(1, 2) != 3", {}),
    "raises": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        with self.assertRaises(ValueError): add(1, 2)",
        {},
    ),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_tests_are_not_skipped_or_satisfied_by_a_trick(cheat):
    special = {"no check": "check", "assertions of unittest": "unittest", "SkipTest": "unittest", "isclose": "isclose"}
    special |= {"never different": "different", "code of unittest": "unittest", "contexts of unittest": "raises"}
    tests, data = UNTRICKED[special.get(cheat, "asserts")]
    assert marked(tests, CHEATS[cheat], data) == 0.0


HASHED = "class Any:\n    def __eq__(self, other): return True\n    def __hash__(self): return 3\n"


def test_what_stands_for_nothing_inside_lists_is_found_and_honest_objects_pass():
    tests = "assert add([1], [2]) == [1, 2]"
    assert marked(tests, CHEATS["equal to anything"].replace("return Any()", "return [1, Any()]")) == 0.0
    for made in ("L([1, Any()])", "D([1, Any()])"):
        own = "from collections import deque as D\nclass L(list): pass\n" + CHEATS["equal to anything"]
        assert marked("assert add([1], [2]) == make([1, 2])", f"{own.replace('Any()', made)}\nmake = {made[0]}") == 0.0
    assert marked("assert add(1, 2) == {3: 1}", f"{HASHED}def add(a, b): return {{Any(): 1}}") == 0.0
    point = "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return isinstance(o, P) and self.x == o.x\n"
    assert marked("assert add(P(1), 2) == P(3)", point + "def add(a, b): return P(a.x + b)") == 1.0


def test_right_answers_are_not_where_the_program_runs():
    peep = (
        "import sys\nframe, seen = sys._getframe(), ''\nwhile frame:\n    seen += repr(frame.f_locals) + repr(frame.f_globals)\n"
        "    frame = frame.f_back\nprint('found' if 'sec' + 'ret' in seen else 'nothing')"
    )
    assert marked({"input": "x", "output": "nothing"}, peep) == 1.0
    job = read_suite(Problem.of_text("7", "", "", data={"tests": {"input": "x", "output": "secret"}})).jobs()
    assert "secret" not in json.dumps(job)


def test_nothing_tells_a_program_how_long_the_right_answer_is():
    for words in (["NO", "YES"], ["1", "1000"]):
        suites = [{"inputs": ["a", "b"], "outputs": outputs} for outputs in (words, words[::-1], words[:1] * 2)]
        jobs = [read_suite(Problem.of_text("7", "", "", data={"tests": tests})).jobs() for tests in suites]
        assert jobs[0] == jobs[1] == jobs[2]


# ---- which block is the program ----

USAGE = "Usage:\n```python\nprint(add(1, 2))\n```"
DOCSTRING = "def add(a, b):\n    '''Adds.\n\n    ```\n    add(1, 2)\n    ```\n    '''\n    return a + b\n"
FENCED = {
    "tagged": f"So:\n```python\n{ADD}```\nDone.",
    "no language": f"So:\n```\n{ADD}```\nDone.",
    "other spellings": f"```Python3\n{ADD}```",
    "braces": f"```{{.python}}\n{ADD}```",
    "crlf": f"```python\n{ADD}```\n{USAGE}".replace("\n", "\r\n"),
    "a title": f'```python title="a.py" hl_lines="1"\n{ADD}```',
    "a name": f"```python:add.py\n{ADD}```",
    "spaces": f"``` python \n{ADD}```  \n",
    "tildes": f"~~~python\n{ADD}~~~",
    "four": f"````python\n{DOCSTRING}````",
    "usage after": f"```python\n{ADD}```\n{USAGE}",
    "usage that fails": f"```python\n{ADD}```\n```python\nadd(1, 2, 3)\n```",
    "usage without a language": f"```python\n{ADD}```\n```\n>>> add(1, 2)\n3\n```",
    "output": f"```\n{ADD}```\nOutput:\n```\n3\n```",
    "a main after": f"```python\n{ADD}```\n```python\ndef main():\n    print(add(1, 2))\nmain()\n```",
    "tests after": f"```python\n{ADD}```\n```python\ndef test_add():\n    assert add(1, 2) == 3\n```",
    "bash after": f"```python\n{ADD}```\n```bash\npython a.py\n```\n```c++\nint f() {{}}\n```\n```pycon\n>>> 1\n```",
    "bash before": f"```bash\npip install numpy\n```\n```\n{ADD}```",
    "untagged, then tagged usage": f"```\n{ADD}```\n{USAGE}",
    "a helper before": "```python\ndef plus(a, b):\n    return a + b\n```\n```python\ndef add(a, b):\n    return plus(a, b)\n```",
    "an import before": "```python\nimport operator\n```\n```python\ndef add(a, b):\n    return operator.add(a, b)\n```",
    "a lambda": f"```python\nadd = lambda a, b: a + b\n```\n{USAGE}",
    "wrong before": f"```python\n{WRONG}```\nNo:\n```python\n{ADD}```",
    "a thought": f"<think>\n```python\n{WRONG}```\n</think>\n```python\n{ADD}```",
    "a thought, wrong last": f"```python\n{ADD}```\nor\n```python\n{WRONG}</think>\n```\n{ADD}```",
    "in a docstring": f"```python\n{DOCSTRING}```",
    "in a module's docstring": f'```python\n"""Adds.\n\n```python\nadd(1, 2)\n```\n"""\n{ADD}```\nDone.',
    "in a string": f"```python\nTEXT = '''\n```\n'''\n{ADD}```\n{USAGE}",
    "indented": "1. So\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n",
    "indented with tabs": "-\tSo\n\t```python\n\tdef add(a, b):\n\t\treturn a + b\n\t```\n",
    "unclosed": f"So:\n```python\n{ADD}",
    "usage cut short": f"```python\n{ADD}```\n```python\nprint(add(1,",
    "the fence was in the prompt": f"{ADD}```\nDone.",
    "nothing else": ADD,
}


FENCED_BY_NAME = {
    "another version": f"```python\n{ADD}```\nOr:\n```python\ndef add_all(*numbers):\n    return sum(numbers)\n```",
    "unittest after": f"```python\n{ADD}```\n```python\nimport unittest\nclass T(unittest.TestCase):\n"
    "    def test_one(self): self.assertEqual(add(1, 2), 3)\nunittest.main()\n```",
    "imported by its tests": f"```python\n{ADD}```\n```python\nfrom solution import add\nassert add(1, 1) == 3\n"
    "def test_one(): pass\n```",
    "its last version": f"```python\n{WRONG}```\n```python\n{ADD}```",
    "tags": f"<answer>```python\n{ADD}```</answer>",
    "tags of turns": f"```python\n{ADD}``` </s>\n<|im_end|>",
    "behind a line": f"So:```\n{ADD.rstrip()}```\n{USAGE}",
}


@pytest.mark.parametrize("name", FENCED_BY_NAME)
def test_the_program_is_found_by_what_the_tests_use(name):
    assert marked("assert add(1, 2) == 3", FENCED_BY_NAME[name]) == 1.0


def test_all_that_the_tests_use_is_in_the_program():
    text = "```python\nclass P:\n    x = 3\n```\n```python\ndef add(a, b):\n    return a + b\n```"
    assert marked("from solution import add, P\ndef test_one():\n    assert add(1, 2) == P.x", text) == 1.0
    assert marked({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}, FENCED_BY_NAME["another version"]) == 1.0


@pytest.mark.parametrize("name", FENCED)
def test_the_program_is_found(name):
    names = {}
    exec(program(FENCED[name]), names)
    assert names["add"](1, 2) == 3


def test_the_cases_of_fences_that_were_found():
    file = CASES / "code_fences.jsonl"
    if not file.exists():
        pytest.skip("needs the shared cases")
    for case in map(json.loads, filter(str.strip, file.read_text().splitlines())):
        assert marked(case["tests"], case["text"]) == case["score"], case["name"]


def test_of_programs_that_read_the_last_that_reads_is_meant():
    text = f"```python\ndef slow(n): pass\n```\n```python\n{SUM}```\n```\n3\n```"
    assert program(text, reads_input=True) == SUM
    assert program("```python\nprint(1)\n```\n```python\nprint(2)\n```") == "print(2)\n"
    assert program("```python\ndef f(:\n```") == "def f(:\n"
    assert program("```json\n{}\n```") == "```json\n{}\n```"
    assert program("") == ""


def test_a_text_of_fences_is_read_in_little_time():
    for text in (
        "```python\n" * 300,
        "```\n" * 300,
        "`" * 30_000,
        "```python\nx = '''\n" + "```\n" * 300,
        "((((" * 3_000,
        "<a" * 100_000,
        "```python\n" + "<a> " * 50_000 + "x\n```",
        " " * 100_000 + "x```",
    ):
        start = time.process_time()
        program(text)
        assert time.process_time() - start < 3


def test_prepared_tests_say_what_they_import():
    assert prepare("import numpy.testing as npt\nfrom math import sin\nnpt.assert_allclose(sin(f()), 0)").imports == (
        "numpy.testing",
        "math",
    )
