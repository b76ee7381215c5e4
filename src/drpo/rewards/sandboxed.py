"""Run untrusted Python against tests, in a process that has first given up all that it could do harm with.

A script for an interpreter of its own, which imports the standard library alone. It reads one JSON object on its
standard input and writes lines of JSON to its standard output: {"refused": why} or {"broken": why the tests cannot be
run}, or {"begun": true} before the code runs, and then what came of it. For tests that assert that is one line,
{"token": ..., "passed": ...}, when the last is over: who does not see the token has seen no verdict. For tests that
compare answers it is a line {"answer": ...} for each, and the right answers are not in this process.

Numbers that have no name in the standard library are those of linux/prctl.h, sched.h, seccomp.h, landlock.h, audit.h,
fcntl.h and mount.h, and of the tables of system calls, all of which are stable.
"""

import builtins
import ctypes
import errno
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
"""Constants that tests call, and that are replaced by functions here: no name leads to these."""
PASSED, FAILED, SILENT = "1", "0", "-"
"""Of a test: it came to its end and asserted something, or it did not, or it asserted nothing."""

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
"""Audit events: calls by which an assertion could be skipped, or found."""
_CODE = ("__code__", "__defaults__", "__kwdefaults__")
"""Of a function: it does something else with another one of these, under whatever name it was put back."""
_CASES = ("unittest.case", "_pytest.raises")
"""Modules whose classes hold the assertions of test programs."""
_ANSWER = 63
"""The descriptor that a called function's answer is written to."""
_CLONE_THREAD = 0x10000

# What the filter lets through: each call with its number on x86-64 and on 64-bit ARM. Everything else is refused, what
# later kernels bring included. No call here starts or replaces a process, acts on another one, opens a socket to
# anywhere, or holds memory that RLIMIT_AS does not count, but for threads and the buffers of 64 descriptors.
_CALLS = """
    brk 12 214, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, mincore 27 232,
    msync 26 227, mbind 237 235,

    read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
    preadv2 327 286, pwritev2 328 287, lseek 8 62, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24,
    fcntl 72 25, ioctl 16 29, pipe 22 -, pipe2 293 59, eventfd 284 -, eventfd2 290 19, timerfd_create 283 85,
    timerfd_settime 286 86, timerfd_gettime 287 87, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
    epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
    epoll_pwait2 441 441,

    socketpair 53 199, sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210,
    getsockname 51 204, getpeername 52 205, getsockopt 55 209,

    open 2 -, openat 257 56, creat 85 -, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291,
    statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439, getdents 78 -, getdents64 217 61,
    getcwd 79 17, chdir 80 49, fchdir 81 50, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35,
    rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36,
    readlink 89 -, readlinkat 267 78, mknod 133 -, mknodat 259 33, chmod 90 -, fchmod 91 52, fchmodat 268 53,
    fchmodat2 452 452, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, umask 95 166, utime 132 -, utimes 235 -,
    futimesat 261 -, utimensat 280 88, truncate 76 45, ftruncate 77 46, fallocate 285 47, fadvise64 221 223,
    readahead 187 213, copy_file_range 326 285, fsync 74 82, fdatasync 75 83, flock 73 32, getxattr 191 8,
    lgetxattr 192 9, fgetxattr 193 10, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, listxattr 194 11,
    llistxattr 195 12, flistxattr 196 13, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,

    clone 56 220, exit 60 93, exit_group 231 94, futex 202 98, set_tid_address 218 96, set_robust_list 273 99,
    rseq 334 293, arch_prctl 158 -, prctl 157 167, sched_yield 24 124, sched_setaffinity 203 122,
    sched_getaffinity 204 123,
    sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126,
    rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
    rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -, restart_syscall 219 128,

    time 201 -, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114, nanosleep 35 101,
    clock_nanosleep 230 115, alarm 37 -, getitimer 36 102, setitimer 38 103, times 100 153,

    getpid 39 172, getppid 110 173, gettid 186 178, getpgrp 111 -, getpgid 121 155, getsid 124 156, getuid 102 174,
    geteuid 107 175, getresuid 118 148, getgid 104 176, getegid 108 177, getresgid 120 150, getgroups 115 158,
    getpriority 140 141, getrlimit 97 163, setrlimit 160 164, prlimit64 302 261, getrusage 98 165, sysinfo 99 179,
    uname 63 160, getcpu 309 168, getrandom 318 278, capget 125 90, wait4 61 260, waitid 247 95
"""
_MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}
"""Per machine: its number in audit.h; the column of its numbers above."""
_BITS, _STREAM = 0xFFFFFFFF, 1
_ARGUMENTS: dict[str, tuple[tuple[int, int, tuple[int, ...]], ...]] = {
    "clone": ((0, _CLONE_THREAD, (_CLONE_THREAD,)),),  # threads of its own
    # Not: have a signal of one's choice sent to another process (SETOWN, SETSIG), keep others from opening a file
    # (SETLEASE), enlarge a pipe. So DUPFD, GETFD, SETFD, GETFL, SETFL, locks, DUPFD_CLOEXEC, GETPIPE_SZ.
    "fcntl": ((1, _BITS, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),),
    # Not FIOSETOWN and SIOCSPGRP, which are SETOWN. So TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX,
    # FIOCLEX, FICLONE.
    "ioctl": ((1, _BITS, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x40049409)),),
    "prctl": ((0, _BITS, (15, 16, 0x53564D41)),),  # names of threads and of memory
    "prlimit64": ((0, _BITS, (0,)),),  # its own
    "sched_setaffinity": ((0, _BITS, (0,)),),
    # Datagrams could be sent to any socket that has a path, by sendmsg too, whose address no filter sees.
    "socketpair": ((0, _BITS, (1,)), (1, 0xF, (_STREAM,))),
}
"""Of some calls: which argument, masked, has to be one of which values."""
_LOAD, _MASK, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000


class RefusedError(Exception):
    """The system does not let a process give something up."""


def main() -> None:
    """Read the job, leave for the sandbox, run the code."""
    job = json.load(sys.stdin)
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    try:
        _libc().prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != job["parent"]:
            os._exit(1)  # it ended before that
        if job["isolated"]:
            _enter_namespaces(job["folder"], job["file_mb"])
        _check(_libc().prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
        _bar_writing(job["folder"])
        _check(_libc().capset(struct.pack("=Ii", _CAPABILITIES_V3, 0), struct.pack("=6I", *[0] * 6)), "no capabilities")
        _limit(job)
        os.chdir(job["folder"])
        (_refuse_calls if job["kind"] == "asserts" else _try_filter)()
    except (RefusedError, OSError) as error:
        _say(report, {"refused": str(error)})
        os._exit(1)
    if job["kind"] == "asserts":
        _examine(job, report)
    elif _questioned(job, report):  # in a process of its own, which ends as any program does
        _answer(job)


def _questioned(job: dict[str, Any], report: int) -> bool:
    """Have one process after the other give an answer, and tell each; True in such a process."""
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
            _refuse_calls()
            return True
        _, status = os.waitpid(child, 0)
        text = os.pread(answer, test["longest"], 0).decode(errors="replace") if status == 0 else None
        _say(report, {"answer": text})
        os.close(given)
        os.close(answer)
    os._exit(0)


def _try_filter() -> None:
    """Refuse where the processes to come could not have their filter."""
    child = os.fork()
    if child == 0:
        try:
            _refuse_calls()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RefusedError("a filter of system calls")


def _file(content: bytes) -> int:
    """A file without a name that begins with `content`; other than pipes it takes and gives any amount."""
    name = "answer"
    number = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(name)
    os.write(number, content)
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _answer(job: dict[str, Any]) -> None:
    """Run the code as a program, which answers on standard output, or call its function and write what it returns."""
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
    """A function of the program, or a method of its class `Solution`, as some sites require it."""
    names = module.__dict__
    if entry not in names and "Solution" in names:
        method: Callable[..., Any] = getattr(names["Solution"](), entry)
        return method
    function: Callable[..., Any] = eval(entry, names)
    return function


def _plain(value: Any) -> Any:
    """What arrays and their numbers are as lists and numbers."""
    return value.tolist()


def _examine(job: dict[str, Any], report: int) -> None:
    """Run the code, then each test where the code left its names, and tell the verdict.

    The code may have put something of its own in the place of any name in any module, so what is used after it has been
    taken before it; and built-ins, and what is in the modules that the tests import, are put back before each test.
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
        except BaseException:  # sys.exit too: it has not come to its end
            passed.append(b"0")
        else:
            passed.append(b"1" if count or test is None else b"-")
        if passed[0] == b"0":
            break
    write(report, verdict + b"".join(passed[1:]) + b'"}\n')
    leave(0)  # not by way of the code's threads and exit handlers


def _counter(count: list[None]) -> Callable[[], None]:
    def passed() -> None:
        count.append(None)

    return passed


def _runner() -> Callable[..., None]:
    """What calls the functions of a test program, and runs its `unittest.TestCase`s."""

    def run(functions: list[Any], cases: list[Any]) -> None:
        found = [(case, [case(name) for name in dir(case) if name.startswith("test")]) for case in cases]
        for function in functions:
            function()
        for case, tests in found:
            case.setUpClass()
            for test in tests:
                test.debug()
            case.tearDownClass()

    return run


def _genuine() -> Callable[[Any], Any]:
    """What refuses an object that is equal to anything, alone or in lists, tuples, sets and dictionaries."""
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
        try:  # not "is True": what an assert takes for it
            any_equal = bool(value == nothing) or bool(value != nothing) is False
        except Exception:  # of an array: it is neither
            any_equal = False
        if any_equal:
            raise error("it is equal to anything")
        return value

    return genuine


def _no_tracing() -> Callable[[str, Any], None]:
    """A hook, which cannot be taken away, against what could skip an assertion or look for what counts them."""
    barred, code = frozenset(_BARRED), frozenset(_CODE)
    there = {id(f): f for f in gc.get_objects() if isinstance(f, types.FunctionType)}  # a program may change its own
    error, name_of = PermissionError, id

    def hook(event: str, arguments: Any) -> None:
        if event in barred or (
            event == "object.__setattr__" and arguments[1] in code and name_of(arguments[0]) in there
        ):
            raise error(f"no {event} here")

    return hook


def _kept(imports: list[str]) -> Callable[[], None]:
    """Import what the tests do; return what puts the names of these packages, and the built-ins, back."""
    packages = {importlib.import_module(name).__name__.partition(".")[0] for name in imports}
    packages |= {f"_{name}" for name in packages}  # where pytest, say, has what it is made of
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
    """The code with tools in the place of the constants that name them."""
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
        # Counted in the namespace of users where there is one of its own; else with all that this user runs.
        *([(resource.RLIMIT_NPROC, _THREADS)] if job["isolated"] else []),
    ):
        resource.setrlimit(kind, (bound, bound))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails, and the code may catch that


def _enter_namespaces(folder: str, file_mb: int) -> None:
    """Go where there is no network, no other process, and nothing to write to but an empty folder in memory."""
    libc, user, group = _libc(), os.geteuid(), os.getegid()
    _check(libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_PIDS | _NEW_NETWORK | _NEW_IPC), "namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _check(libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None), "private mounts")
    # On the other mounts devices could be written to even where files cannot.
    attributes = struct.pack("=QQQQ", _READ_ONLY | _NO_SETUID | _NO_DEVICES, 0, 0, 0)
    _check(
        libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes)), "read-only mounts"
    )
    room = f"size={file_mb}m,nr_inodes=4096,mode=700".encode()
    _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _NO_SETUID | _NO_DEVICES, room), "a folder in memory")
    # Command lines stand in /proc for all to read; environments are out of reach already, in another user namespace.
    hidden = _READ_ONLY | _NO_SETUID | _NO_DEVICES
    _check(libc.mount(b"tmpfs", b"/proc", b"tmpfs", hidden, b"size=4k,nr_inodes=2"), "an empty /proc")
    inner = os.fork()  # only a child enters the new process namespace
    if inner:
        _, status = os.waitpid(inner, 0)
        os._exit(0 if status == 0 else 1)
    libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _bar_writing(folder: str) -> None:
    """Have Landlock, where the kernel has it, refuse to write, make or remove anything outside the folder.

    Named pipes can be written to even where they stand on a read-only mount. Landlock also keeps the memory and the
    environment of processes outside from being read.
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


def _refuse_calls() -> None:
    """Have the kernel refuse whatever is not in the table, to this process and for ever."""
    steps = filter_of(platform.machine())
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    header = struct.pack("@HP", len(steps), ctypes.addressof(program))
    _check(_libc().prctl(_SET_SECCOMP, _FILTER, header, 0, 0), "a filter of system calls")


def filter_of(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter of system calls, as instructions (code, jump if true, jump if false, operand).

    Args:
        machine: as `platform.machine()` names it.

    Raises:
        RefusedError: there is no table for it.
    """
    if machine not in _MACHINES:
        raise RefusedError(f"no table of system calls for {machine}")
    number, column = _MACHINES[machine]
    steps = [
        (_LOAD, 0, 0, 4),  # the machine
        (_EQUAL, 1, 0, number),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the call
        (_AT_LEAST, 0, 1, 0x40000000),  # of another binary interface
        (_RETURN, 0, 0, _KILL),
    ]
    for words in (entry.split() for entry in _CALLS.split(",")):
        if words[column] != "-":
            allowed = _allow(words[0])
            steps += [(_EQUAL, 0, len(allowed), int(words[column])), *allowed]
    # "Not in this kernel", on which the C library falls back: from clone3 on clone, whose flags can be seen from here.
    return [*steps, (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]


def _allow(call: str) -> list[tuple[int, int, int, int]]:
    steps = []
    for argument, mask, values in _ARGUMENTS.get(call, ()):
        steps += [
            (_LOAD, 0, 0, 16 + 8 * argument),
            (_MASK, 0, 0, mask),
        ]  # its lower half, which is all the kernel reads
        steps += [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        steps += [(_RETURN, 0, 0, _REFUSE | errno.EPERM)]
    return [*steps, (_RETURN, 0, 0, _ALLOW)]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise RefusedError(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
