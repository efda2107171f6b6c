"""Nothing of a program is in the memory of the next one, and nothing of a killed worker stays on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vpd.sandbox import SAFE_LEVELS, Sandbox, folders, why_not

# The two halves stand apart, so that the searching program itself does not hold the word it looks for.
HALVES = ("only-the-earlier-", "program-holds-this")
SEARCH = f"""
import ctypes, os
class Region(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
libc = ctypes.CDLL(None)
word = {HALVES[0]!r}.encode()
end = {HALVES[1]!r}.encode()
found = 0
# write() to a pipe reads memory through the kernel, which says EFAULT where nothing is mapped.
read, write = os.pipe()
def page(address):
    if libc.write(write, ctypes.c_void_p(address), ctypes.c_size_t(4096)) != 4096:
        return b""
    return os.read(read, 4096)
libc.sbrk.restype = ctypes.c_void_p
top = libc.sbrk(0) & ~4095
places = [(top - 64 * 2**20, top)]
here = id(object()) & ~4095
places.append((here - 32 * 2**20, here + 32 * 2**20))
count = 0
for start, stop in places:
    before = b""
    for address in range(start, stop, 4096):
        now = page(address)
        both = before[-64:] + now
        at = both.find(word)
        while at >= 0:
            if both[at + len(word):at + len(word) + len(end)] == end:
                count += 1
            at = both.find(word, at + 1)
        before = now
print("SUCCEEDED" if count else "nothing")
"""


@pytest.fixture(params=SAFE_LEVELS)
def sandbox(request) -> Iterator[Sandbox]:
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(f"this machine does not offer level {request.param}: {reason}")
    with Sandbox(request.param, workers=1) as made:
        yield made


def test_the_search_finds_what_is_in_the_program_s_own_memory(sandbox):
    """The control: the same search succeeds where the word is there."""
    ended = sandbox.run(f"held = [''.join({HALVES!r}) for _ in range(100)]\n" + SEARCH)
    assert ended.output == "SUCCEEDED\n", ended


def test_an_earlier_program_s_source_input_and_values_are_not_found(sandbox):
    word = "".join(HALVES)
    for _ in range(5):
        sandbox.run(f"# {word}\nprint(input())" + f"\n# {word}" * 50, word * 50)
        with sandbox.functions(f"# {word}\ndef f(x):\n    return x", prelude=f"# {word}") as program:
            assert program.call("f", word).value == word
    ended = sandbox.run(SEARCH)
    assert ended.output == "nothing\n", ended


KILLED = """
import os, signal, sys
from vpd.sandbox import Sandbox
sandbox = Sandbox({level!r}, workers=1)
sandbox.run("print(1)")
(worker,) = sandbox._all
print(worker._folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("level", ["landlock", "unsafe"])
def test_a_killed_trainer_s_folder_is_removed(level, tmp_path):
    if why_not(level) is not None:
        pytest.skip(f"this machine does not offer level {level}")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED.format(level=level)], env=environment, capture_output=True, text=True
    )
    folder = Path(ended.stdout.strip())
    assert folder.parent == tmp_path
    deadline = time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folder.exists()


def test_a_folder_whose_owner_and_worker_were_killed_is_swept_by_the_next_worker(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, young = tmp_path / "vpd-sandbox-left", tmp_path / "vpd-sandbox-young"
    for folder in (left, young):
        (folder / "program-1").mkdir(parents=True)
    with Sandbox("unsafe", workers=1) as sandbox:
        sandbox.run("")
        (used,) = (Path(each._folder or "") for each in sandbox._all)
        for folder in (left, used):
            os.utime(folder, (1, 1))
        folders.make_folder()
        assert (left.exists(), young.exists(), used.exists()) == (False, True, True)
