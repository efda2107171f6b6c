"""Functions of the C library that Python's own modules leave out; they raise errors as OSError.

``PyDLL`` keeps the interpreter's lock, because ``clone`` returns twice and the child must hold the lock.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def check(result: int, what: str) -> int:
    """Return the result; raise OSError with C's errno where it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """Make a raw system call, with integers passed as long and bytes as pointers; a negative result is an error."""
    converted = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    return _libc.syscall(ctypes.c_long(number), *converted)


def prctl(option: int, *arguments: int) -> int:
    return _libc.prctl(ctypes.c_int(option), *(ctypes.c_ulong(value) for value in arguments))


def unshare(flags: int) -> None:
    check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode() or None
    )
    check(result, f"mount {target}")


def unmount(target: str, flags: int) -> None:
    check(_libc.umount2(target.encode(), ctypes.c_int(flags)), f"umount {target}")
