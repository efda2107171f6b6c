"""Writes files in full or not at all, even when the process is killed or the disk is full."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunError(RuntimeError):
    """The folder of the run cannot be read or written; the message is a sentence that says how to mend it."""


TEMPORARY_PATTERN = ".*.tmp"
"""The pattern of the names of files and folders that are being written. A run that finds one was interrupted there."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_BELOW_BYTES = 1 << 20


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace the file by ``text`` in UTF-8; see :func:`atomic_write_bytes`. Lone surrogates become ``?``."""
    atomic_write_bytes(path, text.encode("utf-8", errors="replace"))


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the file by ``data`` so that a reader sees the old or the new content, never a part.

    Raises:
        RunError: The disk is full; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_full_as_run_error(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file below ``folder`` last through a power cut."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


@contextmanager
def disk_full_as_run_error(path: Path) -> Iterator[None]:
    """Turn the error of a full disk, from whichever library it comes, into a :class:`RunError`."""
    try:
        yield
    except Exception as error:
        if not _means_disk_full(error, path):
            raise
        raise RunError(
            f"The disk is full, so {path} was not written. Free some space, or lower run.save_total_limit or "
            "run.logged_samples, then go on with --resume."
        ) from error


def _means_disk_full(error: BaseException, path: Path) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # safetensors and torch.save raise other errors than OSError, with the system's message or without it.
    if "No space left" in str(error):
        return True
    return path.parent.is_dir() and shutil.disk_usage(path.parent).free < _FULL_BELOW_BYTES
