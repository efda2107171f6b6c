"""A filter of system calls (seccomp-bpf) that allows what a pure Python program needs, and nothing that reaches others.

The tables list the calls that are allowed; all others are refused with EPERM, also those that kernels will add later.
Some calls are allowed with certain arguments only: a program may start threads but no processes, signal itself alone,
and make pairs of connected stream sockets (event loops wake themselves with one) but no socket that could reach
anybody. Calls that change files without Landlock knowing (modes, times, owners, attributes) are refused. So are files
in memory, because no limit would count them.

The numbers are those of the kernel's tables for x86-64 and of the generic table for 64-bit ARM.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

from vpd.sandbox.libc import check, prctl

_X86_64 = """
    read=0 write=1 readv=19 writev=20 pread64=17 pwrite64=18 preadv=295 pwritev=296 lseek=8 open=2 openat=257
    openat2=437 creat=85 close=3 close_range=436 dup=32 dup2=33 dup3=292 pipe=22 pipe2=293 stat=4
    fstat=5 lstat=6 newfstatat=262 statx=332 access=21 faccessat=269 faccessat2=439 readlink=89 readlinkat=267
    getdents=78 getdents64=217 getcwd=79 chdir=80 fchdir=81 mkdir=83 mkdirat=258 rmdir=84 unlink=87
    unlinkat=263 rename=82 renameat=264 renameat2=316 link=86 linkat=265 symlink=88 symlinkat=266 truncate=76
    ftruncate=77 fsync=74 fdatasync=75 sync_file_range=277 umask=95 statfs=137
    fstatfs=138 copy_file_range=326 sendfile=40 splice=275 tee=276 fadvise64=221 mmap=9 mprotect=10
    munmap=11 mremap=25 madvise=28 brk=12 msync=26 mincore=27 mlock=149 munlock=150
    membarrier=324 rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 rt_sigpending=127 rt_sigtimedwait=128
    rt_sigsuspend=130 sigaltstack=131 pause=34 alarm=37 getitimer=36 setitimer=38 futex=202 futex_waitv=449
    set_robust_list=273 get_robust_list=274 set_tid_address=218 rseq=334 sched_yield=24 sched_getaffinity=204
    sched_getparam=143 sched_getscheduler=145 sched_get_priority_max=146 sched_get_priority_min=147
    nanosleep=35 clock_nanosleep=230 clock_gettime=228 clock_getres=229 gettimeofday=96 time=201 times=100
    timer_create=222 timer_settime=223 timer_gettime=224 timer_delete=226 timer_getoverrun=225
    timerfd_create=283 timerfd_settime=286 timerfd_gettime=287 poll=7 ppoll=271 select=23 pselect6=270
    epoll_create=213 epoll_create1=291 epoll_ctl=233 epoll_wait=232 epoll_pwait=281 epoll_pwait2=441
    eventfd=284 eventfd2=290 signalfd4=289 getpid=39 gettid=186 getppid=110 getpgrp=111 getpgid=121 getsid=124
    getuid=102 geteuid=107 getgid=104 getegid=108 getresuid=118 getresgid=120 getgroups=115 getrlimit=97
    getrusage=98 getpriority=140 getcpu=309 sysinfo=99 uname=63 getrandom=318 exit=60 exit_group=231
    restart_syscall=219 arch_prctl=158 wait4=61 waitid=247 setrlimit=160 getsockname=51 getpeername=52
    getsockopt=55 setsockopt=54 sendto=44 recvfrom=45 sendmsg=46 recvmsg=47 shutdown=48
"""

_AARCH64 = """
    read=63 write=64 readv=65 writev=66 pread64=67 pwrite64=68 preadv=69 pwritev=70 lseek=62 openat=56
    openat2=437 close=57 close_range=436 dup=23 dup3=24 pipe2=59 fstat=80 statx=291 faccessat=48
    faccessat2=439 readlinkat=78 getdents64=61 getcwd=17 chdir=49 fchdir=50 mkdirat=34 unlinkat=35 renameat=38
    renameat2=276 linkat=37 symlinkat=36 truncate=45 ftruncate=46 fsync=82 fdatasync=83
    sync_file_range=84 umask=166 statfs=43 fstatfs=44 copy_file_range=285 sendfile=71
    splice=76 tee=77 fadvise64=223 mmap=222 mprotect=226 munmap=215 mremap=216 madvise=233 brk=214 msync=227
    mincore=232 mlock=228 munlock=229 membarrier=283 rt_sigaction=134 rt_sigprocmask=135
    rt_sigreturn=139 rt_sigpending=136 rt_sigtimedwait=137 rt_sigsuspend=133 sigaltstack=132 getitimer=102
    setitimer=103 futex=98 futex_waitv=449 set_robust_list=99 get_robust_list=100 set_tid_address=96 rseq=293
    sched_yield=124 sched_getaffinity=123 sched_getparam=121 sched_getscheduler=120 sched_get_priority_max=125
    sched_get_priority_min=126 nanosleep=101 clock_nanosleep=115 clock_gettime=113 clock_getres=114
    gettimeofday=169 times=153 timer_create=107 timer_settime=110 timer_gettime=108 timer_delete=111
    timer_getoverrun=109 timerfd_create=85 timerfd_settime=86 timerfd_gettime=87 ppoll=73 pselect6=72
    epoll_create1=20 epoll_ctl=21 epoll_pwait=22 epoll_pwait2=441 eventfd2=19 signalfd4=74 getpid=172
    gettid=178 getppid=173 getpgid=155 getsid=156 getuid=174 geteuid=175 getgid=176 getegid=177 getresuid=148
    getresgid=150 getgroups=158 getrlimit=163 getrusage=165 getpriority=141 getcpu=168 sysinfo=179 uname=160
    getrandom=278 exit=93 exit_group=94 restart_syscall=128 wait4=260 waitid=95 setrlimit=164 getsockname=204
    getpeername=205 getsockopt=209 setsockopt=208 sendto=206 recvfrom=207 sendmsg=211 recvmsg=212 shutdown=210
"""

# These calls are allowed with certain arguments only.
_CONDITIONAL = {
    "x86_64": {
        "clone": 56,
        "kill": 62,
        "tgkill": 234,
        "socketpair": 53,
        "prlimit64": 302,
        "ioctl": 16,
        "prctl": 157,
        "clone3": 435,
        "fcntl": 72,
        "flock": 73,
    },
    "aarch64": {
        "clone": 220,
        "kill": 129,
        "tgkill": 131,
        "socketpair": 199,
        "prlimit64": 261,
        "ioctl": 29,
        "prctl": 167,
        "clone3": 435,
        "fcntl": 25,
        "flock": 32,
    },
}
_AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_TABLES = {"x86_64": _X86_64, "aarch64": _AARCH64}

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
# To refuse with the error number 0 is to do nothing and report success.
_SUCCEED = _REFUSE
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32_BIT = 0x40000000

_CLONE_VM_THREAD = 0x00010100
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF
# Python's own files make these requests: isatty, the window's size, close-on-exec on and off, the number of waiting
# bytes, and non-blocking mode.
_IOCTLS = (0x5401, 0x5413, 0x5451, 0x5450, 0x541B, 0x5421)
# These commands make duplicates and set flags and the size of pipes. The command that sets who gets a descriptor's
# signals is left out, because that could be anybody.
_FCNTLS = (*range(5), *range(1030, 1035))
# A program's locks are granted without asking the kernel: the program is alone with its own files, and on files that
# it shares with others a lock would be a message to them.
_LOCK_FCNTLS = (5, 6, 7, 36, 37, 38)
_PR_SET_NAME, _PR_GET_NAME, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 15, 16, 38, 22
_SECCOMP_MODE_FILTER = 2


def is_supported() -> bool:
    """Tell whether there is a table for this CPU."""
    return platform.machine() in _TABLES


def restrict_system_calls(own_pid: int) -> None:
    """Filter this process's system calls from now on, for good.

    Args:
        own_pid: The process's id as the process itself sees it; it may send signals to this process alone.

    Raises:
        OSError: The kernel refuses, or there is no table for the CPU.
    """
    if not is_supported():
        raise OSError(errno.ENOSYS, f"there is no table of system calls for {platform.machine()}")
    program = _program(platform.machine(), own_pid)
    buffer = ctypes.create_string_buffer(program)
    # A struct sock_fprog holds the number of instructions, which have 8 bytes each, and their address.
    fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    check(prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    check(prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(fprog), 0, 0), "PR_SET_SECCOMP")


def _program(machine: str, own_pid: int) -> bytes:
    calls = _CONDITIONAL[machine]
    instructions = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_EQUAL, _AUDIT_ARCHITECTURES[machine], 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        # On x86-64 the same kernel also takes the x32 numbers, which stand for other calls.
        _instruction(_JUMP_GREATER_EQUAL, _X32_BIT, 0, 1),
        _instruction(_RETURN, _KILL),
    ]
    for entry in _TABLES[machine].split():
        instructions += _on(int(entry.partition("=")[2]), [_instruction(_RETURN, _ALLOW)])
    instructions += _on(calls["clone"], _if_all_bits(0, _CLONE_VM_THREAD))
    # After ENOSYS glibc falls back to clone, whose flags the filter can read.
    instructions += _on(calls["clone3"], [_instruction(_RETURN, _REFUSE | errno.ENOSYS)])
    instructions += _on(calls["kill"], _if_argument(0, (own_pid,)))
    instructions += _on(calls["tgkill"], _if_argument(0, (own_pid,)))
    instructions += _on(calls["prlimit64"], _if_argument(0, (0, own_pid)))
    instructions += _on(calls["ioctl"], _if_argument(1, _IOCTLS))
    instructions += _on(calls["flock"], [_instruction(_RETURN, _SUCCEED)])
    instructions += _on(calls["fcntl"], _if_argument(1, _LOCK_FCNTLS, _SUCCEED, _if_argument(1, _FCNTLS)))
    instructions += _on(calls["prctl"], _if_argument(0, (_PR_SET_NAME, _PR_GET_NAME)))
    stream = [
        _instruction(_LOAD, _ARGUMENTS + 8),
        _instruction(_AND, _SOCK_TYPE_MASK),
        _instruction(_JUMP_EQUAL, _SOCK_STREAM, 0, 1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _REFUSE | errno.EPERM),
    ]
    unix = [_instruction(_LOAD, _ARGUMENTS), _instruction(_JUMP_EQUAL, _AF_UNIX, 0, len(stream) - 1), *stream]
    instructions += _on(calls["socketpair"], unix)
    instructions.append(_instruction(_RETURN, _REFUSE | errno.EPERM))
    return b"".join(instructions)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _on(number: int, block: list[bytes]) -> list[bytes]:
    """Run the block where the call has this number; the block ends the filter."""
    return [_instruction(_JUMP_EQUAL, number, 0, len(block)), *block]


def _if_argument(
    index: int, values: tuple[int, ...], then: int = _ALLOW, otherwise: list[bytes] | None = None
) -> list[bytes]:
    """Allow the call where the lower half of an argument, which is an int in C, is one of the values.

    ``then`` is another answer for these values, and ``otherwise`` the block for all others, which are refused without.
    """
    block = [_instruction(_LOAD, _ARGUMENTS + 8 * index)]
    for value in values:
        block += [_instruction(_JUMP_EQUAL, value, 0, 1), _instruction(_RETURN, then)]
    return [*block, *(otherwise or [_instruction(_RETURN, _REFUSE | errno.EPERM)])]


def _if_all_bits(index: int, bits: int) -> list[bytes]:
    return [
        _instruction(_LOAD, _ARGUMENTS + 8 * index),
        _instruction(_AND, bits),
        _instruction(_JUMP_EQUAL, bits, 0, 1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _REFUSE | errno.EPERM),
    ]
