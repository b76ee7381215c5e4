"""The system calls that a sandboxed program may make, as a seccomp filter.

The trainer computes the filter and sends it with the job (`drpo.rewards.python`); the sandbox, a script that imports
the standard library alone, installs it (`drpo.rewards.sandboxed`). The numbers are those of linux/seccomp.h, audit.h,
fcntl.h and prctl.h and of the tables of system calls, all of which are stable.
"""

import errno
from functools import lru_cache
from typing import TypeAlias

Step: TypeAlias = tuple[int, int, int, int]
"""An instruction of the filter: code, jump if true, jump if false, operand."""

_CLONE_THREAD = 0x10000

# The allowed calls, each with its number on x86-64 and on 64-bit ARM. All others are refused, also those of later
# kernels. No call here starts or replaces a process, acts on another process, connects a socket, or allocates memory
# that RLIMIT_AS does not count, except for threads and the buffers of 64 descriptors.
CALLS = """
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
MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}
"""Machine -> its number in audit.h, and the column of its numbers in `CALLS`."""
_BITS, _STREAM = 0xFFFFFFFF, 1
ARGUMENTS: dict[str, tuple[tuple[int, int, tuple[int, ...]], ...]] = {
    "clone": ((0, _CLONE_THREAD, (_CLONE_THREAD,)),),  # threads only
    # Not SETOWN and SETSIG (signals to other processes), SETLEASE (blocks others from opening a file), or a larger
    # pipe. So DUPFD, GETFD, SETFD, GETFL, SETFL, locks, DUPFD_CLOEXEC, GETPIPE_SZ.
    "fcntl": ((1, _BITS, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),),
    # Not FIOSETOWN and SIOCSPGRP, which are SETOWN. So TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX,
    # FIOCLEX, FICLONE.
    "ioctl": ((1, _BITS, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x40049409)),),
    "prctl": ((0, _BITS, (15, 16, 0x53564D41)),),  # names of threads and of memory
    "prlimit64": ((0, _BITS, (0,)),),  # the calling process
    "sched_setaffinity": ((0, _BITS, (0,)),),
    # No datagram sockets: they could send to any socket with a path, also by sendmsg, whose address a filter cannot
    # see.
    "socketpair": ((0, _BITS, (1,)), (1, 0xF, (_STREAM,))),
}
"""Call -> conditions: an argument's index, a mask, and the allowed values of the masked argument."""
_LOAD, _MASK, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000


@lru_cache
def filter_of(machine: str) -> tuple[Step, ...]:
    """Return the seccomp filter of a machine, which the sandbox installs; empty if the machine has no table.

    Args:
        machine: as named by `platform.machine()`.
    """
    if machine not in MACHINES:
        return ()
    number, column = MACHINES[machine]
    steps = [
        (_LOAD, 0, 0, 4),  # the machine
        (_EQUAL, 1, 0, number),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the call
        (_AT_LEAST, 0, 1, 0x40000000),  # another binary interface
        (_RETURN, 0, 0, _KILL),
    ]
    for words in (entry.split() for entry in CALLS.split(",")):
        if words[column] != "-":
            allowed = _allow(words[0])
            steps += [(_EQUAL, 0, len(allowed), int(words[column])), *allowed]
    # ENOSYS makes the C library fall back, as from clone3 to clone, whose flags a filter can see.
    return (*steps, (_RETURN, 0, 0, _REFUSE | errno.ENOSYS))


def _allow(call: str) -> list[Step]:
    steps = []
    for argument, mask, values in ARGUMENTS.get(call, ()):
        steps += [
            (_LOAD, 0, 0, 16 + 8 * argument),
            (_MASK, 0, 0, mask),
        ]  # the lower half, the only part that the kernel reads
        steps += [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        steps += [(_RETURN, 0, 0, _REFUSE | errno.EPERM)]
    return [*steps, (_RETURN, 0, 0, _ALLOW)]
