"""Signals let the step under way end, also where the terminal has gone."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

from vpd.runs.interrupt import InterruptGuard


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with InterruptGuard() as guard:
        signal.raise_signal(number)
        assert guard.signal_number == number
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptGuard() as guard:
            signal.raise_signal(signal.SIGHUP)
        assert guard.signal_number is None
    finally:
        signal.signal(signal.SIGHUP, before)


WORK = """
import sys, time
from pathlib import Path
from vpd.runs.interrupt import InterruptGuard
with InterruptGuard() as guard:
    print("begun", flush=True)
    while guard.signal_number is None:
        time.sleep(0.01)
    print("a last line", flush=True)
    print("another", file=sys.stderr, flush=True)
Path(sys.argv[1]).write_text(str(guard.signal_number))
"""


def test_a_lost_terminal_lets_the_run_save(tmp_path):
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{WORK}",
            tmp_path / "saved",
        ],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    assert b"begun" in os.read(main, 100)
    os.close(main)
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGHUP))
