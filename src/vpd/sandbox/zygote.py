"""The zygote: a process that has an interpreter ready and forks it for each program, behind the kernel's isolation.

It runs under ``python -I -S`` with an empty environment, and has one socket to the trainer. It forks for each program;
the child takes limits and isolation upon itself, and only then runs the program. The zygote waits, ends the program
when its time is up, and reports how it ended. A program that could not be isolated is not run.

    level       new root, process and network namespaces    Landlock    system calls filtered
    full        for every program                           yes         yes
    bubblewrap  by bwrap, around the zygote                 yes         yes
    landlock    no                                          yes         yes
    unsafe      no                                          no          no

The isolation does not cover bugs of the kernel, nor what a program can learn from the time that things take.
"""

from __future__ import annotations

import _thread
import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from typing import Any, TypedDict

from vpd.sandbox import landlock, namespaces, program, seccomp

# These modules are loaded before the first fork, so that programs find them ready.
_COMMON_MODULES = """
abc asyncio bisect collections concurrent.futures copy dataclasses datetime decimal encodings.idna enum fractions
functools heapq itertools math operator queue random re statistics string typing
"""
_READY = b"ready"
_MEGABYTE = 2**20
_WATCH_SECONDS = 0.05
_MOST_FILES = 4096


class Paths(TypedDict):
    """The paths that programs may read.

    Attributes:
        readable: The files and folders that they may read: the interpreter's library without installed packages, and
            shared libraries.
        listable: The folders whose entries they may list, so that the interpreter finds modules.
        packages: The packages that programs may import, each with the folder that it is in.
    """

    readable: list[str]
    listable: list[str]
    packages: dict[str, str]


class _Packages(importlib.abc.MetaPathFinder):
    """Finds the given packages; whatever else is installed beside them does not exist for a program."""

    def __init__(self, folders: dict[str, str]) -> None:
        self._folders = folders

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in self._folders:
            return None
        return importlib.machinery.PathFinder.find_spec(fullname, [self._folders[fullname]], target)


def main(control: int, level: str, paths: Paths, folder: str | None) -> None:
    """Serve programs until the trainer closes the socket.

    Args:
        control: The file descriptor of the socket.
        level: The isolation's level.
        paths: The paths that programs may read.
        folder: The folder in which work folders are made; level "full" does not need it.
    """
    for name in _COMMON_MODULES.split():
        __import__(name)
    # The terminal's Ctrl-C reaches the whole process group, but the trainer decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    # Programs have one core each, and threads of numpy's linear algebra would only take up their memory.
    os.putenv("OPENBLAS_NUM_THREADS", "1")
    sys.meta_path.append(_Packages(paths["packages"]))
    channel = socket.socket(fileno=control)
    if level == "full":
        namespaces.enter([*paths["readable"], *namespaces.DEVICES])
    channel.sendall(_READY)
    try:
        while (job := receive(channel)) is not None:
            message, (*descriptors, abort) = job
            send(channel, _run(message, descriptors, abort, level, paths, folder))
    except (BrokenPipeError, ConnectionResetError):
        # The trainer was killed while a program ran.
        pass
    finally:
        if folder is not None:
            remove_tree(folder)


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Receive the next message with the descriptors sent along; return None at the end."""
    header, descriptors, _, _ = socket.recv_fds(channel, 4, 8)
    if not header:
        return None
    while len(header) < 4:
        header += channel.recv(4 - len(header))
    (length,) = struct.unpack("I", header)
    parts = bytearray()
    while len(parts) < length:
        part = channel.recv(min(length - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return json.loads(parts), descriptors


def send(channel: socket.socket, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    data = json.dumps(message).encode()
    socket.send_fds(channel, [struct.pack("I", len(data))], descriptors)
    channel.sendall(data)


def _run(
    job: dict[str, Any], descriptors: list[int], abort: int, level: str, paths: Paths, folder: str | None
) -> dict[str, Any]:
    """Run one program to its end, and report how it ended.

    Args:
        job: The program's ``kind``, its ``limits``, and ``wall_seconds``, after which it is killed. Nothing that
            belongs to one program alone is part of it, because the next one has a copy of this process's memory.
        descriptors: Standard input, output and error; for functions also requests and answers; and last the pipe
            through which the program itself comes, as JSON with ``source`` and ``prelude``.
        abort: A pipe that is readable, or closed at its other end, once the trainer wants the program killed.
        level: The isolation's level.
        paths: The paths that the program may read.
        folder: The folder in which the work folder is made.
    """
    work = namespaces.WORK if level == "full" else tempfile.mkdtemp(prefix="program-", dir=folder or namespaces.WORK)
    isolated, report = os.pipe()

    def child() -> None:
        try:
            os.setsid()
            namespaces.die_with_parent()
            kept = _only(descriptors, report)
        except BaseException:
            os._exit(125)
        try:
            _isolate(job["limits"], level, paths, work)
        except BaseException as error:
            os.write(kept[-1], f"-{type(error).__name__}: {error}".encode()[:1000])
            os._exit(125)
        os.write(kept[-1], b"+")
        os.close(kept[-1])
        _limit_stacks(job["limits"]["stack_mb"] * _MEGABYTE)
        with open(kept[-2], encoding="utf-8") as pipe:
            texts = json.load(pipe)
        if job["kind"] == "script":
            program.run_script(**texts)
        else:
            program.serve_functions(**texts, requests=kept[3], answers=kept[4])

    start = time.monotonic()
    pid = namespaces.fork_into(child) if level == "full" else _fork(child)
    for descriptor in (*descriptors, report):
        os.close(descriptor)
    # At level full the work folder is in memory and has a size limit of its own.
    watched = None if level == "full" else work
    ended_by = _wait(pid, abort, job["wall_seconds"], watched, job["limits"]["disk_mb"])
    if level == "unsafe":
        # Without isolation a program may have started other processes.
        _kill(-pid)
    _kill(pid)
    _, status, usage = os.wait4(pid, 0)
    said = os.read(isolated, 1024)
    os.close(isolated)
    os.close(abort)
    if level != "full":
        remove_tree(work)
    return {
        "isolated": said == b"+",
        "problem": said[1:].decode(errors="replace"),
        "exit_code": os.waitstatus_to_exitcode(status),
        "ended_by": ended_by,
        "seconds": time.monotonic() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def _fork(child: Any) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(125)
    return pid


def _wait(pid: int, abort: int, seconds: float, watched: str | None, disk_mb: int) -> str | None:
    """Wait until the program ends by itself (None), or must be ended for ``time``, ``disk`` or the ``trainer``."""
    ended = os.pidfd_open(pid)
    deadline = time.monotonic() + seconds
    waiting = select.poll()
    waiting.register(ended, select.POLLIN)
    waiting.register(abort, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0:
            events = [
                descriptor for descriptor, _ in waiting.poll(1000 * min(left, _WATCH_SECONDS if watched else left))
            ]
            if ended in events:
                return None
            if events:
                return "trainer"
            if watched is not None and not _holds_at_most(watched, disk_mb * _MEGABYTE):
                return "disk"
        return "time"
    finally:
        os.close(ended)


def _holds_at_most(folder: str, limit: int) -> bool:
    """Tell whether a folder has at most ``limit`` bytes and a few thousand files; a folder that cannot be read has not.

    Files that were removed while they are open are not seen, but each is within the file-size limit, and their number
    is within the limit of open files.
    """
    size = count = 0
    folders = [folder]
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    count += 1
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if size > limit or count > _MOST_FILES:
                        return False
    except FileNotFoundError:
        # The program has removed it in the meantime.
        return True
    except OSError:
        return False
    return True


def remove_tree(folder: str) -> None:
    """Remove a folder that a program has filled, however deep it is and whatever its modes; the rest stays.

    Folders are moved up before they are emptied, so that no path becomes too long and the function need not recurse.
    """
    if not os.path.lexists(folder):
        return
    pile = tempfile.mkdtemp(prefix="removed-", dir=os.path.dirname(folder))
    first = os.path.join(pile, "0")
    with contextlib.suppress(OSError):
        os.rename(folder, first)
    waiting, number = [first], 0
    while waiting:
        path = waiting.pop()
        with contextlib.suppress(OSError):
            os.chmod(path, 0o700)
            with os.scandir(path) as entries:
                found = list(entries)
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    number += 1
                    moved = os.path.join(pile, str(number))
                    # Only a writable folder can be moved to another parent.
                    os.chmod(entry.path, 0o700)
                    os.rename(entry.path, moved)
                    waiting.append(moved)
                else:
                    os.unlink(entry.path)
            os.rmdir(path)
    with contextlib.suppress(OSError):
        os.rmdir(pile)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _isolate(limits: dict[str, Any], level: str, paths: Paths, work: str) -> None:
    """Put the limits and the level's isolation on this process."""
    if level == "full":
        namespaces.mount_work_folder(limits["disk_mb"])
    os.chdir(work)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    _limit(limits, level)
    if level == "full":
        namespaces.drop_capabilities()
    if level != "unsafe":
        landlock.restrict_files(paths["readable"], paths["listable"], [work, *namespaces.DEVICES])
        seccomp.restrict_system_calls(os.getpid())


def _only(descriptors: list[int], report: int) -> list[int]:
    """Renumber the given descriptors to 0, 1, 2, ... and the report to the next number, and close all others."""
    high = [os.dup2(descriptor, 100 + i, inheritable=False) for i, descriptor in enumerate([*descriptors, report])]
    os.closerange(0, 100)
    low = [os.dup2(descriptor, i) for i, descriptor in enumerate(high)]
    os.closerange(len(low), 100_000)
    return low


def _limit(limits: dict[str, Any], level: str) -> None:
    seconds = int(limits["cpu_seconds"]) + 1
    memory, disk = limits["memory_mb"] * _MEGABYTE, limits["disk_mb"] * _MEGABYTE
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, disk),
        (resource.RLIMIT_NOFILE, limits["descriptors"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 256),
    ):
        resource.setrlimit(kind, (value, value))
    if level != "unsafe":
        tasks = limits["threads"] + (0 if level in ("full", "bubblewrap") else _tasks_of_machine())
        resource.setrlimit(resource.RLIMIT_NPROC, (tasks, tasks))
    # The hard limit stays, so that a program can raise its own: the stack counts as memory anyway.
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = limits["stack_mb"] * _MEGABYTE
    resource.setrlimit(resource.RLIMIT_STACK, (stack if hard == resource.RLIM_INFINITY else min(stack, hard), hard))


def _limit_stacks(most: int) -> None:
    """Give threads at most ``most`` bytes of stack, whatever they ask for.

    Programs ask for half a gigabyte and more to recurse deeply; Python's own calls take hardly any of it.
    """
    original = _thread.stack_size

    def stack_size(size: int = 0, /) -> int:
        return original(min(size, most))

    _thread.stack_size = threading.stack_size = stack_size


def _tasks_of_machine() -> int:
    """Return the number of tasks on the machine.

    Without a user namespace all tasks of the user count towards the limit, and they are at most as many.
    """
    with open("/proc/loadavg") as file:
        return int(file.read().split()[3].partition("/")[2])
