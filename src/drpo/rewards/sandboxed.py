"""Run untrusted Python against tests, in a process that first drops all its privileges.

A script for a separate interpreter; it imports only the standard library. It reads one JSON object from standard input
and writes lines of JSON to standard output: {"refused": reason} if there is no sandbox, {"broken": reason} if the tests
cannot be run, or {"begun": true} before the code runs, followed by results. Asserting tests give one line at the end,
{"token": ..., "passed": ...}; a line without the job's token is no verdict. Tests that compare answers give a line
{"answer": ...} each; this process does not receive the right answers.

Numbers without a name in the standard library are those of linux/prctl.h, sched.h, seccomp.h, landlock.h and mount.h,
all of which are stable.
"""

import builtins
import ctypes
import gc
import importlib
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from collections import deque
from collections.abc import Callable
from typing import Any

COUNT, GENUINE, RUN = "drpo: count", "drpo: genuine", "drpo: run"
"""Constants that prepared tests call; they are replaced by functions that no name refers to."""
PASSED, FAILED, SILENT = "1", "0", "-"
"""Verdicts of a test: it ended and asserted something; it did not end; it ended without an assertion."""

_NEW_USER, _NEW_MOUNTS, _NEW_PIDS, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x20000, 0x20000000, 0x40000000, 0x08000000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _PRIVATE, _RECURSIVE = 1, 2, 4, 1 << 18, 1 << 14
_SET_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 1, 38, 22, 2
_CAPABILITIES_V3 = 0x20080522
_LANDLOCK, _WRITE_FILE = 444, 2
_THREADS = 1024
_BARRED = (
    "sys.settrace",
    "sys.setprofile",
    "sys.monitoring.register_callback",
    "sys._current_frames",
    "gc.get_objects",
    "gc.get_referrers",
    "gc.get_referents",
)
"""Audit events of calls that could skip or find an assertion."""
_CODE = ("__code__", "__defaults__", "__kwdefaults__")
"""Attributes of a function that change what it does."""
_CASES = ("unittest.case", "_pytest.raises")
"""Modules with the assertion classes of test programs."""
_ANSWER = 63
"""The descriptor for a called function's answer."""


class RefusedError(Exception):
    """The system does not allow a step of the sandbox."""


def main() -> None:
    """Read the job, enter the sandbox, run the code."""
    job = json.load(sys.stdin)
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    try:
        _libc().prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != job["parent"]:
            os._exit(1)  # the parent ended before
        if job["isolated"]:
            _enter_namespaces(job["folder"], job["file_mb"])
        _check(_libc().prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
        _bar_writing(job["folder"])
        _check(_libc().capset(struct.pack("=Ii", _CAPABILITIES_V3, 0), struct.pack("=6I", *[0] * 6)), "no capabilities")
        _limit(job)
        os.chdir(job["folder"])
        (_refuse_calls if job["kind"] == "asserts" else _try_filter)(job["filter"])
    except (RefusedError, OSError) as error:
        _say(report, {"refused": str(error)})
        os._exit(1)
    if job["kind"] == "asserts":
        _examine(job, report)
    elif _questioned(job, report):  # in a child process, which ends normally
        _answer(job)


def _questioned(job: dict[str, Any], report: int) -> bool:
    """Fork a process per test and report its answer; return True in such a process."""
    _say(report, {"begun": True})
    for test in job["tests"]:
        given, answer = _file(test["input"].encode(errors="surrogatepass")), _file(b"")
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _libc().prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)
            os.dup2(given, 0)
            os.dup2(answer, 1 if job["kind"] == "stdin" else _ANSWER)
            os.closerange(3, _ANSWER)
            _refuse_calls(job["filter"])
            return True
        _, status = os.waitpid(child, 0)
        text = os.pread(answer, test["longest"], 0).decode(errors="replace") if status == 0 else None
        _say(report, {"answer": text})
        os.close(given)
        os.close(answer)
    os._exit(0)


def _try_filter(steps: list[list[int]]) -> None:
    """Raise unless the filter can be installed in a child process."""
    child = os.fork()
    if child == 0:
        try:
            _refuse_calls(steps)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RefusedError("a filter of system calls")


def _file(content: bytes) -> int:
    """Open an unnamed file that begins with `content`; unlike a pipe it has no size limit."""
    name = "answer"
    number = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(name)
    os.write(number, content)
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _answer(job: dict[str, Any]) -> None:
    """Run the code as a program, whose output is the answer, or call its function and write the result."""
    dumps, write = json.dumps, os.write
    module = types.ModuleType("__main__" if job["kind"] == "stdin" else "solution")
    sys.modules[module.__name__] = module
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115 (as long as the process)
    if job["kind"] == "call":
        arguments = json.load(sys.stdin)
    exec(compile(job["code"], "solution.py", "exec"), module.__dict__)
    if job["kind"] == "call":
        write(_ANSWER, dumps(_callable(module, job["entry"])(*arguments), default=_plain).encode())
        os._exit(0)


def _callable(module: types.ModuleType, entry: str) -> Callable[..., Any]:
    """Return a function of the program, or a method of its class `Solution`."""
    names = module.__dict__
    if entry not in names and "Solution" in names:
        method: Callable[..., Any] = getattr(names["Solution"](), entry)
        return method
    function: Callable[..., Any] = eval(entry, names)
    return function


def _plain(value: Any) -> Any:
    """Convert arrays and their numbers to lists and numbers."""
    return value.tolist()


def _examine(job: dict[str, Any], report: int) -> None:
    """Run the code, then each test in its namespace, and report the verdict.

    The code may replace any name in any module. So functions used after it are looked up before it; built-ins and the
    contents of modules that the tests import are restored before each test.
    """
    run, write, leave = exec, os.write, os._exit
    count: list[None] = []
    tools = {COUNT: _counter(count), GENUINE: _genuine(), RUN: _runner()}
    try:
        keep = _kept(job["imports"])
        different = dict.fromkeys(job["tests"])
        codes = {test: _furnished(compile(test, "test.py", "exec", optimize=0), tools) for test in different}
        tests = [codes[test] for test in job["tests"]]
    except BaseException as error:
        _say(report, {"broken": f"{type(error).__name__}: {error}"})
        os._exit(1)
    verdict = f'{{"token": "{job["token"]}", "passed": "'.encode()
    module = types.ModuleType("solution")
    sys.modules["solution"], names = module, module.__dict__
    _say(report, {"begun": True})
    sys.addaudithook(_no_tracing())
    passed = []
    for test in (None, *tests):
        keep()
        names["__builtins__"] = builtins.__dict__
        count.clear()
        try:
            run(compile(job["code"], "solution.py", "exec") if test is None else test, names)
        except BaseException:  # sys.exit too: it did not end normally
            passed.append(b"0")
        else:
            passed.append(b"1" if count or test is None else b"-")
        if passed[0] == b"0":
            break
    write(report, verdict + b"".join(passed[1:]) + b'"}\n')
    leave(0)  # skips the code's threads and exit handlers


def _counter(count: list[None]) -> Callable[[], None]:
    def passed() -> None:
        count.append(None)

    return passed


def _runner() -> Callable[..., None]:
    """Return a function that calls the functions of a test program and runs its `unittest.TestCase`s."""

    def run(functions: list[Any], cases: list[Any]) -> None:
        tests_of = [(case, [case(name) for name in dir(case) if name.startswith("test")]) for case in cases]
        for function in functions:
            function()
        for case, tests in tests_of:
            case.setUpClass()
            for test in tests:
                test.debug()
            case.tearDownClass()

    return run


def _genuine() -> Callable[[Any], Any]:
    """Return a check that raises for objects equal to anything, alone or in lists, tuples, sets and dictionaries."""
    nothing, kind, error, inherits = object(), type, AssertionError, issubclass
    plain = frozenset({int, float, complex, bool, str, bytes, type(None)})
    inside = [(base, base.__iter__) for base in (list, tuple, set, frozenset, deque, dict)]
    values = dict.values

    def genuine(value: Any) -> Any:
        of = kind(value)
        if of in plain:
            return value
        for base, parts in inside:
            if inherits(of, base):
                for part in [*parts(value), *(values(value) if base is dict else ())]:
                    if kind(part) not in plain:
                        genuine(part)
        try:  # bool(), as in an assert
            any_equal = bool(value == nothing) or bool(value != nothing) is False
        except Exception:  # an array is neither
            any_equal = False
        if any_equal:
            raise error("it is equal to anything")
        return value

    return genuine


def _no_tracing() -> Callable[[str, Any], None]:
    """Return an audit hook, which cannot be removed, against skipping assertions and finding their counter."""
    barred, code = frozenset(_BARRED), frozenset(_CODE)
    there = {
        id(f): f for f in gc.get_objects() if isinstance(f, types.FunctionType)
    }  # a program may change its own functions
    error, name_of = PermissionError, id

    def hook(event: str, arguments: Any) -> None:
        if event in barred or (
            event == "object.__setattr__" and arguments[1] in code and name_of(arguments[0]) in there
        ):
            raise error(f"no {event} here")

    return hook


def _kept(imports: list[str]) -> Callable[[], None]:
    """Import the tests' modules; return a function that restores their names and the built-ins."""
    packages = {importlib.import_module(name).__name__.partition(".")[0] for name in imports}
    packages |= {f"_{name}" for name in packages}  # such as _pytest, the internals of pytest
    modules = [module for name, module in [*sys.modules.items()] if name.partition(".")[0] in packages]
    spaces = [(space, dict(space)) for space in map(vars, (builtins, *modules))]
    cases = [value for m in modules if m.__name__ in _CASES for value in vars(m).values() if isinstance(value, type)]
    classes = [(c, dict(vars(c))) for c in cases if c.__module__ in _CASES]

    def keep() -> None:
        for space, whole in spaces:
            space.update(whole)
        for case, whole in classes:
            for name in whole.keys() - {"__dict__", "__weakref__"}:
                if case.__dict__.get(name) is not whole[name]:
                    setattr(case, name, whole[name])

    return keep


def _furnished(code: types.CodeType, tools: dict[str, Any]) -> types.CodeType:
    """Return the code with tools in place of the constants that name them."""
    constants = tuple(
        _furnished(c, tools) if isinstance(c, types.CodeType) else tools.get(c, c) if isinstance(c, str) else c
        for c in code.co_consts
    )
    return code.replace(co_consts=constants)


def _say(to: int, record: dict[str, Any]) -> None:
    os.write(to, json.dumps(record).encode() + b"\n")


def _limit(job: dict[str, Any]) -> None:
    file_bytes, memory = job["file_mb"] << 20, job["memory_mb"] << 20
    for kind, bound in (
        (resource.RLIMIT_CPU, job["cpu_seconds"]),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        # Counted per user namespace; without a new one, all of the user's processes would count.
        *([(resource.RLIMIT_NPROC, _THREADS)] if job["isolated"] else []),
    ):
        resource.setrlimit(kind, (bound, bound))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit raises instead


def _enter_namespaces(folder: str, file_mb: int) -> None:
    """Enter namespaces without network and other processes, where only an empty folder in memory is writable."""
    libc, user, group = _libc(), os.geteuid(), os.getegid()
    _check(libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_PIDS | _NEW_NETWORK | _NEW_IPC), "namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _check(libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None), "private mounts")
    # Read-only mounts still allow writing to devices.
    attributes = struct.pack("=QQQQ", _READ_ONLY | _NO_SETUID | _NO_DEVICES, 0, 0, 0)
    _check(
        libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes)), "read-only mounts"
    )
    room = f"size={file_mb}m,nr_inodes=4096,mode=700".encode()
    _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _NO_SETUID | _NO_DEVICES, room), "a folder in memory")
    # /proc shows command lines to all; environments are protected by the user namespace already.
    hidden = _READ_ONLY | _NO_SETUID | _NO_DEVICES
    _check(libc.mount(b"tmpfs", b"/proc", b"tmpfs", hidden, b"size=4k,nr_inodes=2"), "an empty /proc")
    inner = os.fork()  # only a child enters the new process namespace
    if inner:
        _, status = os.waitpid(inner, 0)
        os._exit(0 if status == 0 else 1)
    libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _bar_writing(folder: str) -> None:
    """Forbid writing, creating and removing outside the folder by Landlock, if the kernel has it.

    Read-only mounts still allow writing to named pipes. Landlock also protects the memory and the environment of
    outside processes from being read.
    """
    version = _libc().syscall(_LANDLOCK, None, 0, 1)
    if version < 1:
        return
    writing = sum(bit for since, bit in ((1, 0x1FF2), (2, 0x2000), (3, 0x4000)) if version >= since)
    rules = _libc().syscall(_LANDLOCK, struct.pack("=Q", writing), 8, 0)
    _check(min(rules, 0), "Landlock")
    for path, allowed in ((folder, writing), (os.devnull, _WRITE_FILE)):
        place = os.open(path, os.O_PATH)
        _check(_libc().syscall(_LANDLOCK + 1, rules, 1, struct.pack("=Qi", allowed, place), 0), "a rule of Landlock")
        os.close(place)
    _check(_libc().syscall(_LANDLOCK + 2, rules, 0), "Landlock")
    os.close(rules)


def _refuse_calls(steps: list[list[int]]) -> None:
    """Install the filter of system calls in this process, permanently."""
    if not steps:
        raise RefusedError(f"no table of system calls for {platform.machine()}")
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    header = struct.pack("@HP", len(steps), ctypes.addressof(program))
    _check(_libc().prctl(_SET_SECCOMP, _FILTER, header, 0, 0), "a filter of system calls")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise RefusedError(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
