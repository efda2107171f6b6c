"""Landlock lets a process limit, without privileges and for good, which files and ports it may use itself.

The kernel checks the file that a path leads to when it is opened, so that symbolic links, ``..`` and ``/proc`` are no
way around the limit.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from vpd.sandbox.libc import check, prctl, syscall

# These numbers are the same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14
# Programs may not make device and socket files: bits 6 and 11 are MAKE_CHAR and MAKE_BLOCK, bit 9 is MAKE_SOCK.
_WRITING = _WRITE_FILE | sum(1 << bit for bit in (4, 5, 7, 8, 12, 13, 14))
_LAST_BIT_BY_VERSION = {1: 12, 2: 13, 3: 14, 4: 14, 5: 15}


def version() -> int:
    """Return the version of the kernel's Landlock; 0 where there is none."""
    return max(0, syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION))


def restrict_files(readable: Iterable[str], listable: Iterable[str], writable: Iterable[str]) -> None:
    """Limit this process to the files beneath these paths, to no TCP port, and to signals within itself.

    The limit on ports (bind and connect) needs version 4 of the kernel's Landlock, the limit on signals version 6.

    Args:
        readable: The files and folders that may be read; missing ones and symbolic links are passed over.
        listable: The folders whose entries may be listed, but not read.
        writable: The folders in which files may be read, written and made, or files that may be read and written.

    Raises:
        OSError: The kernel has no Landlock.
    """
    kernel_version = check(syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION), "Landlock")
    handled = (1 << (_LAST_BIT_BY_VERSION[min(kernel_version, 5)] + 1)) - 1
    attributes = [handled]
    if kernel_version >= 4:
        attributes.append(0b11)
    if kernel_version >= 6:
        attributes.append(0b11)
    encoded = struct.pack(f"{len(attributes)}Q", *attributes)
    ruleset = check(syscall(_CREATE_RULESET, encoded, len(encoded), 0), "landlock_create_ruleset")
    try:
        for path in readable:
            _allow(ruleset, path, (_READ_FILE | _READ_DIR) & handled)
        for path in listable:
            _allow(ruleset, path, _READ_DIR)
        for path in writable:
            _allow(ruleset, path, (_READ_FILE | _READ_DIR | _WRITING) & handled)
        check(prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
        check(syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        if os.path.islink(path):
            return
        if not os.path.isdir(path):
            access &= _FILE_RIGHTS
        rule = struct.pack("=Qi", access, descriptor)
        check(syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0), f"landlock_add_rule {path}")
    finally:
        os.close(descriptor)
