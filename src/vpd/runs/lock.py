"""Keeps a run's folder for one process at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import TextIO

from vpd.config import ConfigError

logger = logging.getLogger(__name__)

LOCK = "run.lock"
"""The name of the file that is locked, and says who holds the lock. It is removed when the run ends."""


class RunLock:
    """Holds a lock on a run's folder from its making until :meth:`release`, or until the process dies.

    The kernel holds the lock, so that one of a killed process is gone with it.

    Args:
        folder: The run's folder, which exists.
        patience: The seconds to wait for another process to let go.

    Raises:
        ConfigError: Another process holds the lock.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        self._path = folder / LOCK
        deadline = time.monotonic() + patience
        while (file := self._attempt()) is None:
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"The run in {folder} is being run already, {holder_of(folder)}: wait until it has ended, or "
                    "choose another run.output_dir."
                )
            time.sleep(0.1)
        self._file: TextIO | None = file
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "start": datetime.now().isoformat(" ", "seconds")}
        file.write(json.dumps(holder) + "\n")
        file.flush()

    def _attempt(self) -> TextIO | None:
        """Open the file and lock it; None where another process holds it."""
        # Opened without truncation, since it may be another's, and closed in programs that this one starts.
        file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.close()
                return None
            logger.warning(
                "The file system of %s has no locks: see to it that one process alone runs there.", self._path
            )
        # The holder before may have removed the file between its opening and its locking here.
        if not self._path.exists() or not os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
            file.close()
            return self._attempt()
        file.truncate(0)
        return file

    def release(self) -> None:
        """Let go of the folder; further calls do nothing."""
        if self._file is None:
            return
        self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None


def holder_of(folder: Path) -> str:
    """Say which process holds the lock on a folder."""
    try:
        holder = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return f"by process {holder['pid']} on {holder['host']} since {holder['start']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "by another process"
