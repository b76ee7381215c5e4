"""Programs against tests: what scores, and what a program can do to the machine that runs it."""

import ctypes
import errno
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

import drpo.rewards.python
from drpo.errors import InputError
from drpo.rewards import PythonTests, RewardConfig, RewardPool, system_calls
from drpo.types import Problem

ADD = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'"]
RIGHT = "def add(a, b):\n    return a + b\n"


def asked(*tests, answer=""):
    return Problem.of_text("7", "Write add(a, b).", answer, data={"tests": list(tests)} if tests else {})


def run(code, *tests, **settings):
    """A score; the time suffices on the busiest machine, because what is tested is something else."""
    return PythonTests(**{"seconds": 120.0, **settings})(asked(*(tests or ADD)), code)


@pytest.fixture(params=[True, False], ids=["isolated", "in the open"])
def isolated(request):
    if request.param:
        try:
            PythonTests()(asked(*ADD), "")
        except InputError as refused:
            pytest.skip(str(refused))
    return request.param


def in_turn(names):
    """Parameters `name` and `isolated`: each name isolated or in the open, in turn; the other way is slow."""
    cases = [
        pytest.param(name, isolated, id=f"{name}-{'isolated' if isolated else 'in the open'}", marks=marks)
        for i, name in enumerate(names)
        for isolated, marks in ((i % 2 == 0, ()), (i % 2 == 1, pytest.mark.slow))
    ]
    return pytest.mark.parametrize(("name", "isolated"), cases, indirect=["isolated"])


isolated_by_default = pytest.mark.parametrize(
    "isolated",
    [pytest.param(True, id="isolated"), pytest.param(False, id="in the open", marks=pytest.mark.slow)],
    indirect=True,
)


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


def test_tests_may_be_one_program_or_the_answer():
    check = "def check(f):\n    assert f(1, 2) == 3\ncheck(add)"
    assert PythonTests()(Problem.of_text("7", "", "", data={"tests": check}), RIGHT) == 1.0
    assert PythonTests()(Problem.of_text("7", "", check), RIGHT) == 1.0
    assert PythonTests()(Problem.of_text("7", "", check), "def add(a, b): return a * b") == 0.0


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (asked(), "problem '7': python_tests needs tests"),
        (asked(" "), "problem '7': python_tests needs tests"),
        (asked("assert True", "assert add(1"), r"problem '7': tests \[1\] is not Python"),
        (asked({"input": "1"}), r"problem '7': tests has inputs and no outputs"),
        (Problem.of_text("7", "", "", data={"tests": None}), r"problem '7': tests is a NoneType"),
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
    "no exec": "import builtins\nbuiltins.exec = lambda *a: None",
    "no compile": "import builtins\nbuiltins.compile = lambda *a: ''",
    "another json": "import json\nsaid = json.dumps\njson.dumps = lambda r: said({**r, 'passed': [True] * 3})",
    "another harness": "import __main__\nfor name in ('_runs', 'exec', 'compile'):\n"
    "    setattr(__main__, name, lambda *a: True)",
}


@in_turn(FAKES)
def test_success_cannot_be_faked_by_ending_early(name, isolated):
    assert run(FAKES[name], isolated=isolated) == 0.0


def test_built_ins_are_the_systems_again_for_every_test():
    lie = "import builtins\ndef add(a, b):\n    builtins.all = lambda x: True\n    return 0\nbuiltins.all = any\n"
    honest = ["add(1, 2)\nassert all([1, 1])", "assert not all([1, 0])", "assert all(map(callable, (exec, compile)))"]
    assert run(lie, *honest, partial=True) == 1.0
    assert run("__builtins__ = {'all': any}\nzero = 0\n", "assert not all([1, zero])") == 1.0


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


@in_turn(ENDLESS)
def test_what_does_not_end_is_ended(name, isolated):
    start = time.perf_counter()
    assert run(ENDLESS[name], seconds=0.4, isolated=isolated) == 0.0
    assert time.perf_counter() - start < 60  # and not 1000
    assert not sandboxes()


def gone(pid):
    """Whether a process ends soon, or has; whoever adopted it may take a while to bury it."""
    for _ in range(600):
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


@isolated_by_default
def test_output_goes_nowhere(isolated, capfd):
    code = (
        "import os, sys\nfor _ in range(8):\n    os.write(1, b'x' * 2**20)\n    print('y' * 2**20, file=sys.stderr)\n"
    )
    assert run(code + RIGHT, isolated=isolated) == 1.0
    assert capfd.readouterr() == ("", "")


def test_memory_is_limited(isolated):
    grab = "blob = bytearray(300 << 20)\n" + RIGHT
    assert run(grab, memory_mb=256, isolated=isolated) == 0.0
    assert run(grab, memory_mb=1024, isolated=isolated) == 1.0


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
        port = server.getsockname()[1]
        server.setblocking(False)
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n{RIGHT}"
        assert run(code, isolated=isolated) == 0.0
        assert run(f"import socket\nsocket.socket(socket.AF_UNIX)\n{RIGHT}", isolated=isolated) == 0.0
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


# Each comes to its end outside a sandbox, and must not inside. VICTIM is another process, FOLDER one with a socket, a
# named pipe that is being read, and a file.
LIBC = "import ctypes, fcntl, os, resource, socket, struct\nlibc = ctypes.CDLL(None)\nsize = ctypes.c_size_t\n"
PIPE, PAIR = "r, w = os.pipe()\n", "r, w = socket.socketpair()\n"
HELD = {
    "shared memory": "i = libc.shmget(0, size(4096), 0o1600)\nassert i >= 0\nlibc.shmctl(i, 0, None)",
    "messages": "i = libc.msgget(0, 0o1600)\nassert i >= 0\nlibc.msgctl(i, 0, None)",
    "semaphores": "i = libc.semget(0, 1, 0o1600)\nassert i >= 0\nlibc.semctl(i, 0, 0)",
    "message queue": "assert libc.mq_open(b'/drpo', 0o102, 0o600, None) >= 0\nlibc.mq_unlink(b'/drpo')",
    "a file in memory": "os.memfd_create('x')",
    "a large pipe": PIPE + "fcntl.fcntl(w, 1031, 1 << 20)",
    "a large socket": PAIR + "r.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)",
    "pages in a pipe": PIPE
    + "b = ctypes.create_string_buffer(4096)\nv = (size * 2)(ctypes.addressof(b), 4096)\n"
    + "assert libc.vmsplice(w, v, size(1), 0) > 0",
}
REACHED = {
    "limits": "resource.prlimit(VICTIM, resource.RLIMIT_CPU, (9000, 9000))",
    "F_SETOWN": PIPE + "fcntl.fcntl(r, 8, VICTIM)",
    "F_SETOWN_EX": PIPE + "fcntl.fcntl(r, 15, struct.pack('ii', 1, VICTIM))",
    "F_SETSIG": PIPE + "fcntl.fcntl(r, 10, 9)",
    "FIOSETOWN": PAIR + "fcntl.ioctl(r, 0x8901, struct.pack('i', VICTIM))",
    "SIOCSPGRP": PAIR + "fcntl.ioctl(r, 0x8902, struct.pack('i', VICTIM))",
    "a lease": "f = open('FOLDER/file')\nfcntl.fcntl(f, 1024, 0)",
    "processors": "os.sched_setaffinity(VICTIM, os.sched_getaffinity(0))",
    "priority": "os.setpriority(os.PRIO_PROCESS, VICTIM, os.getpriority(os.PRIO_PROCESS, VICTIM))",
    "scheduler": "os.sched_setscheduler(VICTIM, os.SCHED_BATCH, os.sched_param(0))",
    "datagrams": "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', 'FOLDER/socket')",
    "datagrams in messages": "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "a.sendmsg([b'x'], [], 0, 'FOLDER/socket')",
}
WRITTEN = {
    "a named pipe": "os.write(os.open('FOLDER/pipe', os.O_WRONLY | os.O_NONBLOCK), b'x')",
    "memory": "open('/proc/VICTIM/mem', 'r+b')",
    "oom_score_adj": "open('/proc/VICTIM/oom_score_adj', 'w').write('1000')",
    "a file": "open('FOLDER/file', 'w').write('x')",
    "a new file": "open('FOLDER/new', 'w').write('x')",
    "a file that was": "os.remove('FOLDER/file')",
}


@pytest.fixture
def victim():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as process:
        yield process
        process.kill()


OUTSIDE = """
import json, sys
done = []
for name, code in json.load(sys.stdin).items():
    try:
        exec(code, globals())
        done.append(name)
    except BaseException as error:
        print(name, repr(error), file=sys.stderr)
print(json.dumps(done))
"""


def prepare(folder):
    (folder / "file").write_text("precious")
    (folder / "new").unlink(missing_ok=True)


def require_refused(misdeeds, isolated, victim, folder):
    """None of the misdeeds that can be done outside a sandbox can be done in one; skips where there is none."""
    os.mkfifo(folder / "pipe")
    prepare(folder)
    programs = {
        name: code.replace("VICTIM", str(victim.pid)).replace("FOLDER", str(folder)) for name, code in misdeeds.items()
    }
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(folder / "socket"))
        command = [sys.executable, "-c", LIBC + OUTSIDE]
        said = subprocess.run(command, input=json.dumps(programs), capture_output=True, text=True, check=True)
        prepare(folder)
        done = {name: programs[name] for name in json.loads(said.stdout)}
        if not done:
            pytest.skip(f"not even outside: {said.stderr}")
        sound = "assert add(1, 2) == 3"
        tests = [*(f"{code}\n{sound}" for code in done.values()), sound]  # whatever they did, the last one is run
        if run(LIBC + RIGHT, *tests, partial=True, isolated=isolated) != 1 / len(tests):
            alone = {name: run(f"{LIBC}{code}\n{RIGHT}", isolated=isolated) for name, code in done.items()}
            pytest.fail(f"not all were refused: {alone}")
    os.close(reader)
    assert victim.poll() is None
    assert (folder / "file").read_text() == "precious" and not (folder / "new").exists()


def test_calls_that_hold_memory_or_reach_others_are_refused(isolated, victim, tmp_path):
    require_refused(HELD | REACHED, isolated, victim, tmp_path)


def test_nothing_outside_is_written_to_where_there_is_landlock(isolated, victim, tmp_path):
    if ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:
        pytest.skip("needs Landlock")
    require_refused(WRITTEN, isolated, victim, tmp_path)


def test_it_has_no_capabilities_and_a_bounded_number_of_threads(isolated):
    code = (
        "import ctypes, resource, struct\ndata = ctypes.create_string_buffer(24)\n"
        "assert ctypes.CDLL(None).capget(struct.pack('=Ii', 0x20080522, 0), data) == 0 and not any(data.raw)\n"
    )
    assert run(code + RIGHT, isolated=isolated) == 1.0
    bounded = "import resource\nassert resource.getrlimit(resource.RLIMIT_NPROC) == (1024, 1024)\n" + RIGHT
    assert run(bounded, isolated=isolated) == float(isolated)


USUAL = {
    "asyncio": "import asyncio\nasync def f():\n    return await asyncio.to_thread(int)\nassert asyncio.run(f()) == 0",
    "threads": "from concurrent.futures import ThreadPoolExecutor as P\nassert list(P(4).map(abs, [-1, 2])) == [1, 2]",
    "files": "import os, pathlib, shutil, tempfile\nwith tempfile.TemporaryDirectory() as d:\n"
    "    tempfile.NamedTemporaryFile(dir=d).write(b'x')\nos.makedirs('a/b')\n"
    "pathlib.Path('a/b/c').write_text('x' * 100000)\nshutil.copytree('a', 'd')\nshutil.copy2('a/b/c', 'd/e')\n"
    "shutil.move('d/e', 'a/e')\nos.link('a/e', 'd/f')\nos.rename('d/f', 'a/f')\nshutil.make_archive('z', 'zip', 'a')\n"
    "shutil.rmtree('d')\nassert sorted(os.listdir('a')) == ['b', 'e', 'f'] and os.path.getsize('a/f') == 100000",
    "sqlite": "import sqlite3\nc = sqlite3.connect('x.db')\nc.execute('pragma journal_mode=wal')\n"
    "c.execute('create table t(a)')\nc.execute('insert into t values(7)')\nc.commit()\n"
    "assert c.execute('select a from t').fetchone() == (7,)",
    "alarm": "import signal\nrung = []\nsignal.signal(signal.SIGALRM, lambda *a: rung.append(1))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.05)\nwhile not rung:\n    pass",
    "pipes": "import os, select, socket\nr, w = os.pipe()\ne = select.epoll()\ne.register(r)\nos.write(w, b'x')\n"
    "assert e.poll() and select.select([r], [], [])[0] == [r]\na, b = socket.socketpair()\na.send(b'x')\nb.recv(1)",
    "mmap": "import mmap\nm = mmap.mmap(-1, 1 << 20)\nm[0] = 1\nf = open('m', 'w+b')\nf.truncate(4096)\n"
    "n = mmap.mmap(f.fileno(), 0)\nn[0] = 1\nn.flush()",
    "numpy": "import numpy as np\nassert (np.ones((300, 300)) @ np.ones((300, 300)))[0, 0] == 300",
    "the rest": "import datetime, hashlib, os, random, time, uuid, zoneinfo\nuuid.uuid4()\nos.urandom(4)\n"
    "time.sleep(0.01)\ntime.process_time()\nos.times()\nos.sched_getaffinity(0)\nos.umask(0o22)\nos.statvfs('.')",
}


@isolated_by_default
def test_what_programs_usually_do_they_can_do(isolated):
    settings = {"memory_mb": 4096, "isolated": isolated}
    if run(RIGHT, *ADD, *(f"{code}\nassert True" for code in USUAL.values()), **settings) != 1.0:
        pytest.fail(f"not all work: { {name: run(f'{code}{RIGHT}', **settings) for name, code in USUAL.items()} }")


# ---- the filter, by its instructions: so for the machine that this is not, too ----

ALLOWED, KILLED, UNKNOWN, FORBIDDEN = 0x7FFF0000, 0x80000000, 0x50000 | errno.ENOSYS, 0x50000 | errno.EPERM
HEADERS = {
    "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": "/usr/include/asm-generic/unistd.h",
}
MACHINES = pytest.mark.parametrize("machine", HEADERS)


def verdict(machine, call, *arguments, of=None):
    """What the kernel would make of a call, by the rules of classic BPF for struct seccomp_data."""
    number = system_calls.MACHINES[of or machine][0]
    data = struct.pack("=iI7Q", call, number, 0, *arguments, *[0] * (6 - len(arguments)))
    steps, at, value = system_calls.filter_of(machine), 0, 0
    while True:
        code, yes, no, operand = steps[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        elif code == 0x54:
            value &= operand
        elif code in (0x15, 0x35):
            at += yes if (value == operand if code == 0x15 else value >= operand) else no
        else:
            assert code == 0x06
            return operand


def numbers(machine):
    """The table's calls."""
    column = system_calls.MACHINES[machine][1]
    rows = [entry.split() for entry in system_calls.CALLS.split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


@MACHINES
def test_the_numbers_are_those_of_the_kernels_headers(machine):
    if not Path(HEADERS[machine]).is_file():
        pytest.skip("needs the kernel's headers")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", Path(HEADERS[machine]).read_text(), re.MULTILINE)
    true = {"newfstatat" if name == "fstatat" else name: int(number) for name, number in found}
    table = numbers(machine)
    assert {name: true.get(name, number) for name, number in table.items()} == table
    assert len(set(table) - set(true)) <= 1  # fchmodat2 is younger than some headers
    other = numbers("aarch64" if machine == "x86_64" else "x86_64")
    assert not (set(other) & set(true)) - set(table)


@MACHINES
def test_the_filter_lets_through_what_the_table_says_and_nothing_else(machine):
    table = numbers(machine)
    plain = {number for name, number in table.items() if name not in system_calls.ARGUMENTS}
    for call in range(1024):
        found = verdict(machine, call, 1 << 30, 1 << 30)
        assert found == (ALLOWED if call in plain else FORBIDDEN if call in table.values() else UNKNOWN), call
        assert verdict(machine, call | 0x40000000) == KILLED
        assert verdict(machine, call, of="aarch64" if machine == "x86_64" else "x86_64") == KILLED


@MACHINES
@pytest.mark.parametrize(
    ("call", "allowed", "forbidden"),
    [
        ("clone", [(0x10000,), (0x3D0F00,)], [(17,), (0x4111,), (0x7E020000,)]),
        ("fcntl", [(9, 3), (9, 1030)], [(9, 8), (9, 10), (9, 15), (9, 1024), (9, 1031), (3, 1026)]),
        ("ioctl", [(9, 0x5401), (9, 0x5421)], [(9, 0x8901), (9, 0x8902), (9, 0x5412), (9, 0x5452)]),
        ("prctl", [(15,)], [(1,), (4,), (22,), (62,)]),
        ("prlimit64", [(0, 7), (1 << 32, 7)], [(1,), (0xFFFFFFFF,)]),
        ("sched_setaffinity", [(0,)], [(1,)]),
        ("socketpair", [(1, 1), (1, 0o2004001)], [(1, 2), (1, 5), (2, 1), (16, 1), (1, 0o2000002)]),
    ],
)
def test_arguments_decide_over_some_calls(machine, call, allowed, forbidden):
    number = numbers(machine)[call]
    assert [verdict(machine, number, *a) for a in allowed] == [ALLOWED] * len(allowed)
    assert [verdict(machine, number, *a) for a in forbidden] == [FORBIDDEN] * len(forbidden)


# ---- what it can see, what it leaves ----


def test_the_environment_is_empty(monkeypatch, isolated):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    found = "import os\nassert 'hunter2' in repr(dict(os.environ))\n" + RIGHT
    assert run(found, isolated=isolated) == 0.0
    assert (
        run("import os\nassert set(os.environ) <= {'HOME', 'TMPDIR', 'LC_CTYPE'}\n" + RIGHT, isolated=isolated) == 1.0
    )


def test_nor_can_it_be_read_from_other_processes():
    try:
        PythonTests()(asked(*ADD), "")
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
        PythonTests()(asked(*ADD), "")
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
    texts = [RIGHT, "import time\nwhile True: time.sleep(1)", "import os\nos._exit(0)", "x"]
    with RewardPool(PythonTests(seconds=3.0, isolated=False), RewardConfig(processes=2, seconds=200)) as pool:
        marks = pool.score([(asked(*ADD), text) for text in texts])
    assert [(m.score, m.failure) for m in marks] == [(1.0, None), (0.0, None), (0.0, None), (0.0, None)]


def test_one_that_is_killed_at_the_pools_deadline_leaves_no_sandbox():
    for seconds in (2.0, 20.0, 200.0):  # until it is enough for a sandbox to be there
        with (
            watched() as seen,
            RewardPool(PythonTests(seconds=1000, isolated=False), RewardConfig(seconds=seconds)) as pool,
        ):
            (mark,) = pool.score([(asked(*ADD), "import time\ntime.sleep(1000)")])
        assert mark.failure.kind == "timed_out"
        if seen:
            break
    assert seen and all(map(gone, seen))


@contextmanager
def watched():
    """The process ids of the sandboxes that are seen meanwhile."""
    seen, over = set(), threading.Event()

    def watch():
        while not over.wait(0.05):
            with suppress(psutil.Error):
                seen.update(p.pid for p in sandboxes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


CALLER = """
import sys
from drpo.rewards import PythonTests
from drpo.types import Problem
PythonTests(seconds=1000, isolated=sys.argv[2] == "True")(Problem.of_text("7", "", "assert f()"), sys.argv[1])
"""


def test_a_sandbox_does_not_outlive_a_killed_caller(isolated):
    with subprocess.Popen([sys.executable, "-c", CALLER, STAYS + "time.sleep(1000)", str(isolated)]) as caller:
        for _ in range(2000):
            with suppress(psutil.Error):
                found = sandboxes()
                if any(p.num_threads() > 1 for p in found):  # so the program runs
                    break
            time.sleep(0.05)
        caller.kill()
    assert len(found) == 1 + isolated and all(gone(p.pid) for p in found)
