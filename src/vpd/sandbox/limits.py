"""The limits of a program: how much it may use before it is stopped."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The resources of one program.

    A program may start no processes, but as many threads as have room for their stacks in its memory.

    Attributes:
        seconds: How much wall-clock time, and how much CPU time, a script may take, or each call of a function.
        memory_mb: How much address space it may have, in MB; the interpreter itself takes about 60 of them.
        disk_mb: How much all the files that it writes may hold together, in MB.
        output_kb: How much it may write to standard output, to standard error, and as returned values, each in kB.
        descriptors: How many files it may have open.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    disk_mb: int = 16
    output_kb: int = 1024
    descriptors: int = 64
