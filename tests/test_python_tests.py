"""Programs against tests: what scores, and what a program can do to the machine that runs it."""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import drpo.rewards.python
from drpo.errors import InputError
from drpo.rewards import Marking, PythonTests, RewardPool
from drpo.rewards.python import program
from drpo.types import Problem

ADD = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'"]
RIGHT = "def add(a, b):\n    return a + b\n"


def asked(*tests, answer=""):
    return Problem("7", "Write add(a, b).", answer, data={"tests": list(tests)} if tests else {})


def run(code, *tests, **settings):
    return PythonTests(**{"seconds": 3.0, **settings})(asked(*(tests or ADD)), code)


@pytest.fixture(params=[True, False], ids=["isolated", "in the open"])
def isolated(request):
    if request.param:
        try:
            PythonTests()(asked("pass"), "")
        except InputError as refused:
            pytest.skip(str(refused))
    return request.param


# ---- scores ----


@pytest.mark.parametrize(
    ("code", "score", "share"),
    [
        (RIGHT, 1.0, 1.0),
        ("def add(a, b):\n    return a - b", 0.0, 0.0),
        ("def add(a, b):\n    return int(a) + int(b)", 0.0, 2 / 3),
        ("def add(a, b):\n    return a + b\n1 / 0", 0.0, 0.0),
        ("def add(a, b:", 0.0, 0.0),
        ("\0", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("Sorry, I cannot.", 0.0, 0.0),
    ],
)
def test_right_wrong_and_partly_right(code, score, share):
    assert run(code) == score
    assert run(code, partial=True) == pytest.approx(share)


def test_the_last_python_block_counts_cut_short_or_not():
    wrong = "def add(a, b):\n    return 0\n"
    assert run(f"So:\n```python\n{wrong}```\nNo, better:\n```python\n{RIGHT}```\nDone.\n```\n1 + 1 = 2\n```") == 1.0
    assert run(f"```python\n{RIGHT}```\n```python\n{wrong}```") == 0.0
    assert run(f"```py\n{RIGHT}") == 1.0
    assert program("```\nx\n```") == "```\nx\n```"


def test_tests_may_be_one_program_or_the_answer():
    check = "def check(f):\n    assert f(1, 2) == 3\ncheck(add)"
    assert PythonTests()(Problem("7", "", "", data={"tests": check}), RIGHT) == 1.0
    assert PythonTests()(Problem("7", "", check), RIGHT) == 1.0
    assert PythonTests()(Problem("7", "", check), "def add(a, b): return a * b") == 0.0


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (asked(), "problem '7': python_tests needs tests"),
        (asked(" "), "problem '7': python_tests needs tests"),
        (asked("assert True", "assert add(1"), r"problem '7': tests\[1\] is not Python"),
        (asked({"input": "1"}), r"problem '7': tests\[0\] is a dict, not a program's text"),
        (Problem("7", "", "", data={"tests": None}), r"problem '7': tests\[0\] is a NoneType"),
    ],
)
def test_a_problem_without_tests_is_an_error_and_not_a_wrong_answer(problem, message):
    with pytest.raises(InputError, match=message):
        PythonTests()(problem, RIGHT)


@pytest.mark.parametrize("change", [{"seconds": 0}, {"seconds": float("nan")}, {"memory_mb": 1}, {"file_mb": 0}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(InputError, match=f"python_tests: {next(iter(change))}="):
        PythonTests(**change)


# ---- harm ----

SHOUT = """
import os
for descriptor in range(20):
    try:
        os.write(descriptor, b'LINE\\n')
    except OSError:
        pass
os._exit(0)
"""
FAKES = {
    "exit early": "import os\nos._exit(0)",
    "sys.exit": "raise SystemExit(0)",
    "exit in the test": "import sys\ndef add(a, b): sys.exit(0)",
    "say so": SHOUT.replace("LINE", '{"passed": [true, true, true]}'),
    "guess a token": SHOUT.replace("LINE", '{"token": "", "passed": [true, true, true]}'),
    "end the interpreter": "import ctypes\nctypes.string_at(0)",
}


@pytest.mark.parametrize("name", FAKES)
def test_success_cannot_be_faked_by_ending_early(name, isolated):
    assert run(FAKES[name], isolated=isolated) == 0.0


DEAF = """
import signal
for number in set(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True:
    pass
"""
STAYS = "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n"
ENDLESS = {
    "loop": "while True: pass",
    "loop in C": "import itertools\nall(itertools.repeat(True))",
    "sleep": "import time\ntime.sleep(1000)",
    "print": "while True: print('x' * 10000)",
    "deaf": DEAF,
    "a thread that stays": STAYS + "while True: pass",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_does_not_end_is_ended(name, isolated):
    start = time.perf_counter()
    assert run(ENDLESS[name], seconds=0.7, isolated=isolated) == 0.0
    assert time.perf_counter() - start < 3
    assert not sandboxes()


def gone(pid):
    """Whether a process ends soon, or has; whoever adopted it may take a while to bury it."""
    for _ in range(40):
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


def sandboxes():
    """Sandboxes of this process that are still alive."""
    mine = psutil.Process().children(recursive=True)
    return [p for p in mine if p.status() != psutil.STATUS_ZOMBIE and any("sandboxed" in part for part in p.cmdline())]


def test_a_thread_left_behind_does_not_keep_the_verdict(isolated):
    assert run(STAYS + RIGHT, isolated=isolated) == 1.0


def test_output_goes_nowhere(isolated, capfd):
    code = (
        "import os, sys\nfor _ in range(64):\n    os.write(1, b'x' * 2**20)\n    print('y' * 2**20, file=sys.stderr)\n"
    )
    assert run(code + RIGHT, isolated=isolated) == 1.0
    assert capfd.readouterr() == ("", "")


def test_memory_is_limited(isolated):
    grab = "blob = bytearray(900 << 20)\n" + RIGHT
    assert run(grab, memory_mb=512, isolated=isolated) == 0.0
    assert run(grab, memory_mb=2048, isolated=isolated) == 1.0


def test_no_process_can_be_started(isolated):
    fork = "import os\nif os.fork() == 0:\n    os._exit(0)\n" + RIGHT
    assert run(fork, isolated=isolated) == 0.0
    bomb = "import os\nwhile True:\n    os.fork()\n"
    assert run(bomb, isolated=isolated) == 0.0
    spawn = "import subprocess\nsubprocess.run(['true'])\n" + RIGHT
    assert run(spawn, isolated=isolated) == 0.0
    escape = "import os\nos.setsid()\n" + RIGHT
    assert run(escape, isolated=isolated) == 0.0
    replace = "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'pass'])"
    assert run(replace, isolated=isolated) == 0.0
    assert (
        run("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n" + RIGHT, isolated=isolated)
        == 1.0
    )
    assert not sandboxes()


def test_no_process_can_be_harmed(isolated):
    victim = os.getpid()
    for call in (f"os.kill({victim}, 0)", "os.kill(-1, 0)", "os.killpg(0, 0)"):
        assert run(f"import os\n{call}\n" + RIGHT, isolated=isolated) == 0.0


def test_there_is_no_network(isolated):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, calls = server.getsockname()[1], []
        server.settimeout(1.0)

        def accept():
            with suppress(OSError):
                calls.append(server.accept())

        listener = threading.Thread(target=accept)
        listener.start()
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n{RIGHT}"
        assert run(code, isolated=isolated) == 0.0
        assert run(f"import socket\nsocket.socket(socket.AF_UNIX)\n{RIGHT}", isolated=isolated) == 0.0
        listener.join()
    assert not calls


def test_the_environment_is_empty(monkeypatch, isolated):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    found = "import os\nassert 'hunter2' in repr(dict(os.environ))\n" + RIGHT
    assert run(found, isolated=isolated) == 0.0
    assert (
        run("import os\nassert set(os.environ) <= {'HOME', 'TMPDIR', 'LC_CTYPE'}\n" + RIGHT, isolated=isolated) == 1.0
    )


def test_nor_can_it_be_read_from_other_processes():
    try:
        PythonTests()(asked("pass"), "")
    except InputError as refused:
        pytest.skip(str(refused))
    for file in ("environ", "cmdline"):
        peep = f"open('/proc/{os.getpid()}/{file}', 'rb').read()\n" + RIGHT
        assert run(peep) == 0.0
        assert run(peep, isolated=False) == 1.0  # the control: docs/rewards.md says so


def test_huge_files_are_refused_and_nothing_is_left_behind(monkeypatch, tmp_path, isolated):
    monkeypatch.setattr(drpo.rewards.python.tempfile, "tempdir", str(tmp_path))
    huge = "f = open('huge', 'wb')\nfor _ in range(100): f.write(b'x' * 2**20)\nf.close()\n" + RIGHT
    assert run(huge, file_mb=8, isolated=isolated) == 0.0
    small = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\nos.chmod('a', 0)\n" + RIGHT
    assert run(small, file_mb=8, isolated=isolated) == 1.0
    assert list(tmp_path.iterdir()) == []


def test_files_elsewhere_can_be_read_and_not_written(tmp_path):
    try:
        PythonTests()(asked("pass"), "")
    except InputError as refused:
        pytest.skip(str(refused))
    mine = tmp_path / "mine"
    mine.write_text("precious")
    assert run(f"assert open({str(mine)!r}).read() == 'precious'\n" + RIGHT) == 1.0
    for harm in (
        f"open({str(mine)!r}, 'w')",
        f"import os; os.remove({str(mine)!r})",
        f"import os; os.chmod({str(mine)!r}, 0)",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "open('/dev/shm/drpo-was-here', 'w')",
        "open('/dev/zero', 'rb')",
        "import ctypes; assert ctypes.CDLL(None).umount2(b'/proc', 2) == 0",
    ):
        assert run(f"{harm}\n" + RIGHT) == 0.0
    assert mine.read_text() == "precious" and os.listdir(tmp_path) == ["mine"]


def test_where_there_is_no_sandbox_it_refuses_in_one_line(monkeypatch):
    refusing = f"print({json.dumps(json.dumps({'refused': 'namespaces: Operation not permitted'}))})"
    monkeypatch.setattr(drpo.rewards.python.sandboxed, "__file__", _script(refusing))
    with pytest.raises(InputError, match=r"no sandbox here \(namespaces: Operation not permitted\); .*isolated=False"):
        run(RIGHT)


def test_a_sandbox_that_does_not_start_is_a_failure(monkeypatch):
    monkeypatch.setattr(drpo.rewards.python.sandboxed, "__file__", _script("1 / 0"))
    with pytest.raises(RuntimeError, match="did not start"):
        run(RIGHT)


def _script(text, made=[]):  # noqa: B006 (kept alive with the module)
    import tempfile

    made.append(tempfile.NamedTemporaryFile("w", suffix=".py"))  # noqa: SIM115
    made[-1].write(text)
    made[-1].flush()
    return made[-1].name


def test_in_the_pool_an_endless_program_is_a_wrong_answer_and_leaves_nothing():
    texts = [RIGHT, "while True: pass", "import os\nos._exit(0)", "x"]
    with RewardPool(PythonTests(seconds=1.0, isolated=False), Marking(processes=2, seconds=20)) as pool:
        marks = pool.score([(asked(*ADD), text) for text in texts])
    assert [(m.score, m.failure) for m in marks] == [(1.0, None), (0.0, None), (0.0, None), (0.0, None)]


def test_one_that_is_killed_at_the_pools_deadline_leaves_no_sandbox(tmp_path):
    pids = Path(tmp_path / "pid")
    code = f"import os, time\nopen({str(pids)!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)"
    with RewardPool(PythonTests(seconds=100, isolated=False), Marking(seconds=2.0)) as pool:
        (mark,) = pool.score([(asked(*ADD), code)])
        assert mark.failure.kind == "timed_out"
    assert gone(int(pids.read_text()))
