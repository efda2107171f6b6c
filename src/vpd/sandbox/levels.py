"""The levels of isolation, and the functions that find out which of them a machine offers."""

from __future__ import annotations

import platform
import shutil
from functools import cache
from typing import Literal

from vpd.sandbox import landlock, seccomp
from vpd.sandbox.limits import Limits
from vpd.sandbox.worker import Level, SandboxError, Worker

SAFE_LEVELS: tuple[Level, ...] = ("full", "bubblewrap", "landlock")
"""The levels that isolate programs, from the strongest to the weakest."""

# Before version 3 (Linux 6.2) Landlock cannot forbid a program to empty files. At the levels above, the program has a
# root of its own, which hides the files.
_LANDLOCK_VERSIONS = {"full": 1, "bubblewrap": 1, "landlock": 3}


def choose_level(level: Level | Literal["auto"]) -> Level:
    """Return the given level, or with ``auto`` the strongest that this machine offers.

    Raises:
        SandboxError: The machine does not offer the level, or with ``auto`` any; the message says why.
    """
    if level == "unsafe":
        return level
    reasons = []
    for candidate in SAFE_LEVELS if level == "auto" else (level,):
        reason = why_not(candidate)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise SandboxError(
        "Model-written programs are not run, since this machine cannot isolate them. " + " ".join(reasons) + " Allow "
        'user namespaces or a kernel with Landlock (6.2), or set sandbox to "unsafe" to run them without protection.'
    )


@cache
def why_not(level: Level) -> str | None:
    """Say why this machine does not offer a level; return None where it does, after running a first program with it."""
    if platform.system() != "Linux":
        return "it needs Linux."
    if level != "unsafe":
        if not seccomp.is_supported():
            return f"system calls of {platform.machine()} are not known here."
        if landlock.version() < _LANDLOCK_VERSIONS[level]:
            return f"it needs version {_LANDLOCK_VERSIONS[level]} of Landlock, and the kernel has {landlock.version()}."
    if level == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed."
    try:
        worker = Worker(level)
        try:
            ended = worker.run_script("print('fine')", "", Limits())
        finally:
            worker.close()
    except SandboxError as error:
        return str(error)
    return None if ended.output == "fine\n" else f"a first program failed: {ended.errors.strip()[-200:]}"
