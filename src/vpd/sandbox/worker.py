"""The outer side of a sandbox's worker: it starts a zygote in isolation and holds the pipes of the running program."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vpd.sandbox import folders, zygote
from vpd.sandbox.limits import Limits, is_hidden

Level: TypeAlias = Literal["full", "bubblewrap", "landlock", "unsafe"]

_SOURCE_ROOT = Path(__file__).resolve().parents[2]
_BOOTSTRAP = (
    "import sys; sys.path.insert(0, {root!r}); from vpd.sandbox import zygote; sys.path.pop(0); zygote.main({args})"
)
# Without MALLOC_ARENA_MAX glibc reserves 64 MB of address space for each thread.
# With a fixed seed of hashes a program that depends on the order of a set has the same verdict in every worker.
_ENVIRONMENT = {"LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1", "PYTHONHASHSEED": "0"}
_START_SECONDS = 20
_GRACE_SECONDS = 5
"""How long a program's pipes may stay open after its own time has passed."""
_CLEARING_SECONDS = 20
"""How long a worker may take after that before it counts as broken. On a busy machine it takes seconds to remove what a
program leaves behind, such as folders thousands deep."""
_POLL_SECONDS = 0.2


class SandboxError(RuntimeError):
    """The sandbox itself does not work; the error says nothing about the program."""


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """The output of a program, and how it ended.

    Attributes:
        output: The text that it wrote to standard output, up to the limit; undecodable bytes are replaced.
        errors: The text that it wrote to standard error, likewise.
        exit_code: Its exit code; minus the signal's number where a signal killed it.
        stopped: The limit that ended it; None where it ended by itself.
        seconds: The wall-clock time from its start to its end.
    """

    output: str
    errors: str
    exit_code: int
    stopped: Literal["time", "memory", "output", "disk"] | None
    seconds: float


class Worker:
    """A zygote and the socket to it, as the trainer holds them."""

    def __init__(self, level: Level, packages: tuple[str, ...] = ()) -> None:
        shown = _paths(packages)
        ours, theirs = socket.socketpair()
        self._channel = ours
        self._folder = folders.make_folder() if level in ("landlock", "unsafe") else None
        if self._folder is not None:
            # The lock says that the folder's owner lives. The folder is removed even where nobody closes the sandbox
            # before the trainer ends.
            self._lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            weakref.finalize(self, os.close, self._lock)
            weakref.finalize(self, zygote.remove_tree, self._folder)
        arguments = f"{theirs.fileno()}, {level!r}, {shown!r}, {self._folder!r}"
        command = [
            *(_bubblewrap_command(shown) if level == "bubblewrap" else []),
            *(os.path.realpath(sys.executable), "-P", "-s", "-S", "-B"),
            *("-c", _BOOTSTRAP.format(root=str(_SOURCE_ROOT), args=arguments)),
        ]
        self._process = subprocess.Popen(
            command,
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            cwd="/",
        )
        theirs.close()
        ours.settimeout(_START_SECONDS)
        try:
            ready = ours.recv(len(b"ready"))
        except OSError:
            ready = b""
        if ready != b"ready":
            reason = self._last_error_line()
            self.close()
            raise SandboxError(f'The sandbox of level "{level}" did not start: {reason}')

    def run_script(self, source: str, stdin: str, limits: Limits, prelude: str = "") -> ProgramResult:
        running = RunningProgram(self, "script", limits, limits.seconds, limits.seconds, stdin)
        running.feed({"source": source, "prelude": prelude})
        return running.wait()

    def start_functions(self, source: str, prelude: str, limits: Limits, seconds: float) -> RunningProgram:
        running = RunningProgram(self, "functions", limits, seconds, seconds)
        running.feed({"source": source, "prelude": prelude})
        return running

    def send(self, job: dict[str, Any], descriptors: tuple[int, ...]) -> None:
        try:
            zygote.send(self._channel, job, descriptors)
        except OSError as error:
            raise SandboxError(f"The sandbox's worker is gone: {error}. {self._last_error_line()}") from error

    def receive(self, seconds: float) -> dict[str, Any]:
        self._channel.settimeout(seconds)
        try:
            message = zygote.receive(self._channel)
        except OSError as error:
            raise SandboxError(f"The sandbox's worker does not answer: {error}.") from error
        if message is None:
            raise SandboxError(f"The sandbox's worker has ended. {self._last_error_line()}")
        return message[0]

    def close(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()
        if self._folder is not None:
            zygote.remove_tree(self._folder)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def _last_error_line(self) -> str:
        self._process.kill()
        self._process.wait()
        said = self._process.stderr.read() if self._process.stderr is not None else b""
        return said.decode(errors="replace").strip().rpartition("\n")[2] or "it said nothing."


class RunningProgram:
    """A program that runs: its pipes, and the bytes that came through them."""

    def __init__(
        self,
        worker: Worker,
        kind: Literal["script", "functions"],
        limits: Limits,
        wall_seconds: float,
        cpu_seconds: float,
        stdin: str = "",
    ) -> None:
        self._worker = worker
        self._limits = limits
        self._most = limits.output_kb * 1024
        self._kept: dict[int, bytearray] = {}
        self._too_much = False
        self._wall_seconds = wall_seconds
        self._ended: ProgramResult | None = None
        self._selector = selectors.DefaultSelector()
        ours, theirs = [], []
        # The pipes are standard output and error, for functions also requests and answers, then the one that brings the
        # program, and last the one that aborts it when it is closed.
        for outward in (True, True, *((False, True) if kind == "functions" else ()), False, False):
            read, write = os.pipe()
            ours.append(read if outward else write)
            theirs.append(write if outward else read)
        theirs.insert(0, _file_in_memory(stdin.encode()))
        try:
            limit = {**asdict(limits), "cpu_seconds": cpu_seconds}
            worker.send({"kind": kind, "limits": limit, "wall_seconds": wall_seconds}, tuple(theirs))
        except BaseException:
            for descriptor in ours:
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self._output, self._errors, *channels, self._program, self._abort = ours
        self._requests, self._answers = channels or (None, None)
        for descriptor in (self._output, self._errors, self._answers):
            if descriptor is not None:
                os.set_blocking(descriptor, False)
                self._kept[descriptor] = bytearray()
                self._selector.register(descriptor, selectors.EVENT_READ)
        self._open = set(ours)

    def feed(self, texts: dict[str, str]) -> None:
        """Write the program itself down its own pipe; the zygote never sees it."""
        self._write(self._program, json.dumps(texts).encode())
        self._close(self._program)

    def send(self, data: bytes) -> None:
        """Write a request; give up at the time limit, or where the program has closed its end of the pipe."""
        assert self._requests is not None
        self._write(self._requests, data)

    def _write(self, pipe: int, data: bytes) -> None:
        """Write while reading output, so that the two sides never wait for each other forever."""
        os.set_blocking(pipe, False)
        deadline = time.monotonic() + self._limits.seconds
        rest = memoryview(data)
        while rest and time.monotonic() < deadline:
            try:
                rest = rest[os.write(pipe, rest) :]
            except BlockingIOError:
                self._read(_POLL_SECONDS / 100)
            except BrokenPipeError:
                return

    def read_line(self, seconds: float) -> tuple[bytes | None, Literal["time", "output"] | None]:
        """Read the next line of answers, or return None and the limit that was reached (None: the program ended)."""
        assert self._answers is not None
        kept = self._kept[self._answers]
        deadline = time.monotonic() + seconds
        while True:
            line, newline, rest = kept.partition(b"\n")
            if newline:
                kept[:] = rest
                return bytes(line), None
            if self._too_much:
                return None, "output"
            if self._answers not in self._open:
                return None, None
            left = deadline - time.monotonic()
            if left <= 0:
                return None, "time"
            self._read(left)

    def abort(self) -> None:
        """Let the zygote kill the program; nothing happens where the program has ended."""
        self._close(self._abort)

    def wait(self) -> ProgramResult:
        """Wait until the program has ended, and return what it wrote and how it ended."""
        if self._ended is not None:
            return self._ended
        deadline = time.monotonic() + self._wall_seconds + _GRACE_SECONDS
        while not self._too_much and {self._output, self._errors} & self._open and time.monotonic() < deadline:
            if not self._read(_POLL_SECONDS):
                continue
        if self._too_much:
            self.abort()
        report = self._worker.receive(max(deadline - time.monotonic(), _CLEARING_SECONDS))
        while self._read(0):
            pass
        for descriptor in list(self._open):
            self._close(descriptor)
        self._selector.close()
        if not report["isolated"]:
            raise SandboxError(f"A program could not be isolated and was not run: {report['problem']}")
        output, errors = (self._kept[d].decode(errors="replace") for d in (self._output, self._errors))
        self._ended = ProgramResult(
            output, errors, report["exit_code"], self._stopped(report, errors), report["seconds"]
        )
        return self._ended

    def _stopped(self, report: dict[str, Any], errors: str) -> Literal["time", "memory", "output", "disk"] | None:
        if self._too_much:
            return "output"
        if report["ended_by"] in ("time", "disk"):
            return report["ended_by"]
        if report["exit_code"] == -signal.SIGKILL and report["cpu_seconds"] >= self._limits.seconds:
            return "time"
        if report["exit_code"] == -signal.SIGXFSZ:
            return "disk"
        if report["exit_code"] != 0:
            last = errors.rstrip().rpartition("\n")[2]
            if last.startswith("MemoryError"):
                return "memory"
            if last.startswith(("OSError: [Errno 27]", "OSError: [Errno 28]")):
                return "disk"
        return None

    def _read(self, seconds: float) -> bool:
        """Read what the pipes hold, and wait up to ``seconds`` for it.

        Return whether anything came; the end of a pipe counts too.
        """
        if not self._selector.get_map():
            return False
        ready = self._selector.select(seconds)
        for key, _ in ready:
            descriptor = key.fd
            try:
                data = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                continue
            if not data:
                self._close(descriptor)
                continue
            kept = self._kept[descriptor]
            kept += data[: self._most - len(kept)] if len(kept) < self._most else b""
            self._too_much = self._too_much or len(kept) >= self._most
        return bool(ready)

    def _close(self, descriptor: int) -> None:
        if descriptor in self._open:
            self._open.discard(descriptor)
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
            os.close(descriptor)


def _file_in_memory(data: bytes) -> int:
    """Open a file in memory that holds ``data`` and that nobody can change, for standard input.

    A file is what a program finds that asks for the input's size, or that reads it twice.
    """
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def check_packages(packages: tuple[str, ...]) -> None:
    """Raise SandboxError where one of the packages that programs shall have is not installed."""
    for package in packages:
        _package_paths(package)


def _package_paths(package: str) -> list[Path]:
    """Return the files and folders of an installed package, and its folder of shared libraries where it has one.

    Raises:
        SandboxError: It is not installed, or where programs cannot be shown it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SandboxError(f'Programs shall have the package "{package}", which is not installed.')
    if is_hidden(spec.origin):
        raise SandboxError(
            f'Programs shall have the package "{package}", which is installed below /tmp, where they see a folder of '
            "their own: install it elsewhere."
        )
    origin = Path(spec.origin)
    place = origin.parent if spec.submodule_search_locations is not None else origin
    libraries = place.parent / f"{package}.libs"
    return [place, *([libraries] if libraries.is_dir() else [])]


def _paths(packages: tuple[str, ...] = ()) -> zygote.Paths:
    """Return the paths that an interpreter needs to read: its library, shared libraries, and the given packages.

    All other installed packages stay out, because a dataset among them could hold the solutions.
    """
    of_packages = {package: _package_paths(package) for package in packages}
    folders = {package: str(found[0].parent) for package, found in of_packages.items()}
    paths = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
    readable = _without_packages(paths["stdlib"])
    # Each folder counts once: the system's interpreter has its own library in /usr/lib too.
    for folder in dict.fromkeys((str(Path(sys.base_prefix, "lib")), "/lib", "/lib64", "/usr/lib", "/usr/lib64")):
        readable += [folder] if os.path.islink(folder) else _without_packages(folder)
    readable += [
        "/etc/ld.so.cache",
        "/usr/share/zoneinfo",
        *(str(path) for found in of_packages.values() for path in found),
    ]
    return {"readable": readable, "listable": [paths["stdlib"], *folders.values()], "packages": folders}


def _without_packages(folder: str) -> list[str]:
    """Return the entries of a library folder, without interpreters' folders and installed packages."""
    if not os.path.isdir(folder):
        return []
    return [
        str(path)
        for path in sorted(Path(folder).iterdir())
        if path.name not in ("site-packages", "dist-packages", "__pycache__")
        and not (path.name.startswith(("python", "pypy")) and path.is_dir())
    ]


def _bubblewrap_command(paths: zygote.Paths) -> list[str]:
    mounts = []
    for path in [*paths["readable"], str(_SOURCE_ROOT / "vpd")]:
        link = os.path.islink(path)
        mounts += ["--symlink", os.readlink(path), path] if link else ["--ro-bind-try", path, path]
    interpreter = os.path.realpath(sys.executable)
    return [
        *("bwrap", "--unshare-all", "--new-session", "--cap-drop", "ALL", "--clearenv"),
        *("--size", str(64 * 2**20), "--tmpfs", "/tmp", "--dev", "/dev"),
        *(part for name, value in _ENVIRONMENT.items() for part in ("--setenv", name, value)),
        *(*mounts, "--ro-bind", interpreter, interpreter, "--"),
    ]
