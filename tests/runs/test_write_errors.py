"""What keeps a file from being written is told in a sentence that says how to mend it."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest

from vpd.runs import RunError, RunFolder

CASES = {
    errno.ENOSPC: "disk is full, so .* Free some space.*--resume",
    errno.EDQUOT: "disk is full",
    errno.EROFS: "cannot be written .*Mount it for writing.*--resume",
    errno.EACCES: "cannot be written",
    errno.EIO: "failed, so .* system's log",
}


@pytest.mark.parametrize("number", CASES, ids=errno.errorcode.get)
def test_errors_of_the_disk_are_sentences_wherever_they_come(tmp_path, monkeypatch, number):
    folder = RunFolder(tmp_path)
    folder.log(1, "train", {"reward": 1.0})

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    def wrapped(path):
        # As libraries do, with the system's error as the cause.
        try:
            fail()
        except OSError as error:
            raise OSError("The model could not be written.") from error

    for write in (fail, wrapped):
        with pytest.raises(RunError, match=CASES[number]):
            folder.commit_checkpoint(1, write, keep=1)
    monkeypatch.setattr("vpd.runs.folder.open", fail, raising=False)
    with pytest.raises(RunError, match=CASES[number]):
        folder.log(2, "train", {})
    monkeypatch.undo()
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(RunError, match=CASES[number]):
        folder.write_result({"rows": []})
    monkeypatch.undo()
    monkeypatch.setattr("pathlib.Path.rename", fail)
    with pytest.raises(RunError, match=CASES[number]):
        folder.commit_checkpoint(2, lambda path: None, keep=1)


def test_a_file_system_without_inodes_is_not_called_full(tmp_path, monkeypatch):
    room = SimpleNamespace(f_files=100, f_favail=0, f_bavail=1 << 30, f_frsize=4096)
    monkeypatch.setattr("os.statvfs", lambda path: room)

    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match=r"no more files \(inodes\).*Remove some files"):
        RunFolder(tmp_path).commit_checkpoint(1, fail, keep=1)
