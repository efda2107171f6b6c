"""Keeps converted and warm-started models in a cache, in folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# No save takes this long, so that a process that was killed has left what is older.
_ABANDONED_SECONDS = 24 * 3600


def cache_dir() -> Path:
    """Return the cache folder: ``VPD_CACHE``, else ``XDG_CACHE_HOME/vpd``, else ``~/.cache/vpd``. It may not exist."""
    if own := os.environ.get("VPD_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "vpd"
    return Path.home() / ".cache" / "vpd"


@contextmanager
def whole_folder(destination: Path, *, replace: bool) -> Iterator[Path]:
    """Give a new folder to write into, which takes the destination's place only once the block ends without error.

    The new folder stands beside the destination, so that it takes its name in one step of the file system. After an
    error it is removed, and the destination is as it was.

    Args:
        destination: The folder that is to appear.
        replace: Whether an existing destination gives way. Where it does not, the new folder is thrown away, since
            another process has put the same content there in the meantime.

    Raises:
        OSError: The folder cannot be made, filled or renamed.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.partial-"
    for abandoned in destination.parent.glob(f"{prefix}*"):
        if time.time() - abandoned.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(abandoned, ignore_errors=True)
    workspace = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
    try:
        # mkdtemp closes its folder to everyone else; the one inside has the permissions the user chose.
        fresh = workspace / "new"
        fresh.mkdir()
        yield fresh
        _move_into_place(fresh, destination, workspace / "old", replace)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _move_into_place(fresh: Path, destination: Path, old: Path, replace: bool) -> None:
    if replace and destination.exists():
        destination.rename(old)
    try:
        fresh.rename(destination)
    except OSError:
        if old.exists():
            old.rename(destination)
        elif not replace and destination.is_dir():
            return
        raise
