"""One process at a time runs in a folder, and a killed one does not keep the next from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from vpd.config import ConfigError
from vpd.runs import RunFolder
from vpd.runs.lock import LOCK, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from vpd.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_which_a_process_runs_is_refused_with_its_name(tmp_path, holder):
    (tmp_path / ".config.json.77.tmp").write_text("another's, which it is writing")
    with pytest.raises(
        ConfigError, match=rf"run already, by process {holder.pid} on .* since 20\d\d-.* run\.output_dir"
    ):
        RunFolder.open(tmp_path, resume=True)
    assert (tmp_path / ".config.json.77.tmp").exists()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid
    with pytest.raises(ConfigError, match="run already"):
        RunLock(tmp_path, patience=0.3)


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    lock.release()
    assert not (tmp_path / LOCK).exists()
    RunLock(tmp_path).release()


def test_programs_that_the_holder_starts_do_not_hold_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        lock.release()
        RunLock(tmp_path).release()
        child.communicate(b"\n")


def test_who_waits_gets_the_lock_when_it_is_let_go(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    RunLock(tmp_path, patience=30).release()


def test_a_refused_folder_is_not_kept_locked(tmp_path):
    RunFolder(tmp_path).write_config({})
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder.open(tmp_path, resume=False)
    assert not (tmp_path / LOCK).exists()
    RunFolder.open(tmp_path, resume=True).close()
