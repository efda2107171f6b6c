"""Namespaces give a program a root of its own; this module sets them up without privileges.

The zygote enters user, mount, network, IPC, host-name and control-group namespaces once. It builds a root that holds
the interpreter, the shared libraries and three devices, all read-only; nothing else of the machine has a name there.
Each program then gets process, mount and IPC namespaces of its own, and an empty folder in memory of limited size.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Callable, Sequence

from vpd.sandbox.libc import check, mount, prctl, syscall, unmount, unshare

WORK = "/tmp"
"""The only folder inside the new root that a program may write to."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

_NEW_NS, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
# Bind mounts keep these flags of the original, because an unprivileged remount may not drop them. Each has the same
# value as an ST_* flag (which statvfs returns) and as an MS_* flag (which mount takes).
_KEPT = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3 = 0x20080522
_PR_SET_SECUREBITS, _PR_SET_PDEATHSIG = 28, 1
# NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE, each locked, keep root's capabilities from coming back.
_SECUREBITS = 0b11101111
_INSIDE_ID = 1000


def enter(readable: Sequence[str]) -> None:
    """Give this process a new root that shows ``readable`` alone; the process must have a single thread.

    Raises:
        OSError: The kernel or its settings do not let ordinary users do it.
    """
    user, group = os.geteuid(), os.getegid()
    unshare(_NEW_USER | _NEW_NS | _NEW_NET | _NEW_IPC | _NEW_UTS | _NEW_CGROUP)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{_INSIDE_ID} {user} 1")
    _write("/proc/self/gid_map", f"{_INSIDE_ID} {group} 1")
    mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    root = "/tmp"
    mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in readable:
        _show(root, path)
    os.mkdir(root + WORK)
    os.chdir(root)
    # Both roots are mounted in the same place: the old one lies on top, and is unmounted.
    check(syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    unmount(".", _MNT_DETACH)
    os.chdir("/")
    mount("none", "/", flags=_MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _show(root: str, path: str) -> None:
    """Show a file or folder read-only at the same place of the new root; a symbolic link is copied."""
    target = root + path
    if not os.path.lexists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    mount(path, target, flags=_MS_BIND | _MS_REC)
    kept = os.statvfs(target).f_flag & _KEPT
    # A device that is mounted read-only can still be written to.
    mount("none", target, flags=_MS_BIND | _MS_REMOUNT | _MS_RDONLY | kept)


def fork_into(child: Callable[[], None]) -> int:
    """Fork; the child is process 1 of new process, mount and IPC namespaces, and all that it starts dies with it."""
    flags = _NEW_PID | _NEW_NS | _NEW_IPC | signal.SIGCHLD
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = syscall(_SYS_CLONE[os.uname().machine], flags, 0, 0, 0, 0)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        try:
            child()
        finally:
            os._exit(125)
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    return check(pid, "clone")


def mount_work_folder(megabytes: int) -> None:
    """Mount an empty folder in memory for one program; it holds at most this many megabytes."""
    options = f"size={megabytes}m,nr_inodes=4096,mode=700"
    mount("tmpfs", WORK, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)


def drop_capabilities() -> None:
    """Give up every capability for good, inside this namespace as well."""
    prctl(_PR_SET_SECUREBITS, _SECUREBITS)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    check(syscall(_SYS_CAPSET[os.uname().machine], header, struct.pack("6I", *[0] * 6)), "capset")


def die_with_parent() -> None:
    check(prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
