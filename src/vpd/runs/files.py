"""Writes files in full or not at all, even when the process is killed or the disk is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class RunError(RuntimeError):
    """The folder of the run cannot be read or written; the message is a sentence that says how to mend it."""


TEMPORARY_PATTERNS = (".*.tmp", ".*.partial-*")
"""The patterns of the names of files and folders that are being written, the latter by :mod:`vpd.policy.model_cache`. A
run that finds one was interrupted there."""

_FULL_BELOW_BYTES = 1 << 20


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace the file by ``text`` in UTF-8; see :func:`atomic_write_bytes`. Lone surrogates become ``?``."""
    atomic_write_bytes(path, text.encode("utf-8", errors="replace"))


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the file by ``data`` so that a reader sees the old or the new content, never a part.

    Raises:
        RunError: The file cannot be written, or the disk is full; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with write_errors_as_run_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            # Where nothing can be written, nothing can be removed either.
            with suppress(OSError):
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
def write_errors_as_run_errors(path: Path) -> Iterator[None]:
    """Turn the error of a full disk or of a folder that cannot be written into a :class:`RunError`.

    Args:
        path: The file or folder that is being written.
    """
    try:
        yield
    except Exception as error:
        cause = _cause(error, path)
        if cause is None:
            raise
        raise RunError(f"{cause}, so {path} was not written. {_REMEDIES[cause]}, then go on with --resume.") from error


_FULL = "The disk is full"
_NO_FILES = "The disk has room, but its file system can hold no more files (inodes)"
_CLOSED = "The folder cannot be written (any more)"
_FAILED = "The disk, or the connection to it, failed"
_LESS = "lower run.save_total_limit or run.logged_samples"
_REMEDIES = {
    _FULL: f"Free some space, or {_LESS}",
    _NO_FILES: f"Remove some files, or {_LESS}",
    _CLOSED: "Mount it for writing, or give this user the right to write there",
    _FAILED: "Look at the system's log",
}


def _cause(error: BaseException, path: Path) -> str | None:
    """Say why something could not be written; None where the error is of another kind."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.__cause__
    number = cause.errno if isinstance(cause, OSError) else None
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return _CLOSED
    if number in (errno.EIO, errno.ESTALE):
        return _FAILED
    folder = next((parent for parent in path.parents if parent.is_dir()), None)
    room = None if folder is None else os.statvfs(folder)
    no_files = room is not None and room.f_files > 0 and room.f_favail == 0
    # safetensors raises other errors than OSError, with the system's message or without it.
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return _NO_FILES if no_files else _FULL
    if room is not None and room.f_bavail * room.f_frsize < _FULL_BELOW_BYTES:
        return _FULL
    return None
