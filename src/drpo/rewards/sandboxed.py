"""Run untrusted Python against tests, in a process that has first given up all that it could do harm with.

A script for an interpreter of its own, which imports the standard library alone. It reads one JSON object on its
standard input and writes lines of JSON to its standard output: {"refused": why}, or {"begun": true} before the code
runs and {"token": ..., "passed": [...]} when the last test is over. Who does not see the token has seen no verdict.

Numbers that have no name in the standard library are those of linux/prctl.h, sched.h, seccomp.h, audit.h and mount.h,
and of the tables of system calls, all of which are stable.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from collections.abc import Sequence
from typing import Any

_NEW_USER, _NEW_MOUNTS, _NEW_PIDS, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x20000, 0x20000000, 0x40000000, 0x08000000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _PRIVATE, _RECURSIVE = 1, 2, 4, 1 << 18, 1 << 14
_SET_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 1, 38, 22, 2
_CAPABILITIES_V3 = 0x20080522
_CLONE_THREAD = 0x10000

# Per machine: its number in audit.h; the call `clone`; and the calls that start or replace a process (fork, vfork,
# execve, execveat), leave the process group (setsid, setpgid), end or change others (kill, tkill, tgkill,
# rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal, ptrace, process_vm_writev), reach the network (socket,
# io_uring_setup), or undo the isolation (unshare, setns, mount).
_CALLS = {
    "x86_64": (
        0xC000003E,
        56,
        (57, 58, 59, 322, 112, 109, 62, 200, 234, 129, 297, 424, 101, 311, 41, 425, 272, 308, 165),
    ),
    "aarch64": (0xC00000B7, 220, (221, 281, 157, 154, 129, 130, 131, 138, 240, 424, 117, 271, 198, 425, 97, 268, 40)),
}
_CLONE3 = 435
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
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
        if job["isolated"]:
            _enter_namespaces(job["folder"], job["file_mb"])
        _limit(job)
        _refuse_calls()
    except (RefusedError, OSError) as error:
        _say(report, {"refused": str(error)})
        os._exit(1)
    os.chdir(job["folder"])
    _say(report, {"begun": True})
    passed = _examine(job["code"], job["tests"])
    _say(report, {"token": job["token"], "passed": passed})
    os._exit(0)  # not by way of the code's threads and exit handlers


def _examine(code: str, tests: Sequence[str]) -> list[bool]:
    """Run the code, then each test where the code left its names."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    if not _runs(code, "solution.py", module):
        return [False for _ in tests]
    return [_runs(test, "test.py", module) for test in tests]


def _runs(source: str, name: str, module: types.ModuleType) -> bool:
    try:
        exec(compile(source, name, "exec"), module.__dict__)
    except BaseException:  # sys.exit too: it has not come to its end
        return False
    return True


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
    ):
        resource.setrlimit(kind, (bound, bound))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails, and the code may catch that


def _enter_namespaces(folder: str, file_mb: int) -> None:
    """Go where there is no network, no other process, and nothing to write to but an empty folder in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
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
    _check(libc.capset(struct.pack("=Ii", _CAPABILITIES_V3, 0), struct.pack("=6I", *[0] * 6)), "no capabilities")


def _refuse_calls() -> None:
    """Have the kernel refuse to start processes and to open sockets, to this process and for ever."""
    machine = platform.machine()
    if machine not in _CALLS:
        raise RefusedError(f"no table of system calls for {machine}")
    number, clone, refused = _CALLS[machine]
    steps = [
        (_LOAD, 0, 0, 4),  # the machine
        (_EQUAL, 1, 0, number),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the call
        (_AT_LEAST, 0, 1, 0x40000000),  # of another binary interface
        (_RETURN, 0, 0, _KILL),
    ]
    for call in refused:
        steps += [(_EQUAL, 0, 1, call), (_RETURN, 0, 0, _REFUSE | errno.EPERM)]
    # The C library falls back on `clone`, whose flags can be seen from here: it may start threads.
    steps += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]
    steps += [(_EQUAL, 0, 3, clone), (_LOAD, 0, 0, 16), (_ANY_BIT, 1, 0, _CLONE_THREAD)]
    steps += [(_RETURN, 0, 0, _REFUSE | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    header = struct.pack("@HP", len(steps), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    _check(libc.prctl(_SET_SECCOMP, _FILTER, header, 0, 0), "a filter of system calls")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise RefusedError(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
