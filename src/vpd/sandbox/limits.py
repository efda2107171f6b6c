"""The limits of a program: how much it may use before it is stopped."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field

_OWN_FOLDER = "/tmp/"
"""What programs see there is their own folder, whatever the machine has there."""


def is_hidden(path: str) -> bool:
    """Whether a path lies where programs see their own folder, so that they cannot be shown it."""
    return os.path.realpath(path).startswith(_OWN_FOLDER)


def _usual_packages() -> tuple[str, ...]:
    """Return those of numpy and sortedcontainers that programs can be shown; programs of contests use both."""
    found = {name: importlib.util.find_spec(name) for name in ("numpy", "sortedcontainers")}
    return tuple(name for name, spec in found.items() if spec and spec.origin and not is_hidden(spec.origin))


@dataclass(frozen=True, slots=True)
class Limits:
    """The resources of one program.

    Attributes:
        seconds: How much wall-clock time, and how much CPU time, a script may take, or each call of a function.
        memory_mb: How much address space it may have, in MB; the interpreter itself takes about 60 of them.
        disk_mb: How much all the files that it writes may hold together, in MB.
        output_kb: How much it may write to standard output, to standard error, and as returned values, each in kB.
        descriptors: How many files it may have open.
        threads: How many threads it may have; it may start no processes.
        stack_mb: How large its stack is, in MB, and how large that of a thread may be; both count as memory.
        packages: The installed packages that it may import besides the standard library, by default those of numpy and
            sortedcontainers that are installed, and not below ``/tmp``; the sandbox's workers are started with those of
            its own limits.
    """

    seconds: float = 5.0
    memory_mb: int = 1024
    disk_mb: int = 16
    output_kb: int = 16384
    descriptors: int = 64
    threads: int = 64
    stack_mb: int = 64
    packages: tuple[str, ...] = field(default_factory=_usual_packages)
