"""What a program may use before it is stopped."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Resources of one program.

    Attributes:
        seconds: of wall clock, and of processor time, for a script; for each call of a function.
        memory_mb: of address space, the interpreter's own 60 or so included.
        disk_mb: of all the files that it writes.
        output_kb: of standard output, standard error and returned values, each.
        descriptors: open files.

    New processes are not allowed; threads are, as many as their stacks fit into the memory.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    disk_mb: int = 16
    output_kb: int = 1024
    descriptors: int = 64
