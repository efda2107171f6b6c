"""The folders in which programs work at the levels that have none in memory, and their removal after a kill."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from pathlib import Path

from vpd.sandbox import zygote

_FOLDERS = "vpd-sandbox-"
_SETTLED_SECONDS = 60
"""How old a folder is before it counts as left behind: its owner needs a moment to lock it."""


def make_folder() -> str:
    """Make a worker's folder, and remove those whose owners were killed.

    Its owner holds a lock on it, which the kernel releases when the process ends, however that comes about.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                about = os.fstat(descriptor)
                if about.st_uid == os.geteuid() and time.time() - about.st_mtime > _SETTLED_SECONDS:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    zygote.remove_tree(str(left))
            finally:
                os.close(descriptor)
    return tempfile.mkdtemp(prefix=_FOLDERS)
