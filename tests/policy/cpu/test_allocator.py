"""The process keeps freed memory once it is told to."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vpd.policy.cpu.allocator import keep_freed_memory

_SCRIPT = """
import resource, sys, torch
from vpd.policy.cpu.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = [faults() for _ in range(4)]
assert keep_freed_memory(torch.device("cpu"))
# The first ones grow the heap: what alignment cuts off lies between them until its cache of seven is full.
after = [faults() for _ in range(24)][-4:]
print(max(after), min(before))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_a_large_tensor_takes_the_memory_of_the_one_before():
    """A page fault is a page that the system had to make."""
    unsaid = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    result = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True, env=unsaid)
    after, before = map(int, result.stdout.split())
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    has_huge_pages = enabled.exists() and "[always]" in enabled.read_text()
    assert before > (30 if has_huge_pages else 1000), "64 MB in pages of 4 KB, of 64 KB, or of 2 MB"
    assert after < before / 10


def test_on_other_devices_and_where_the_environment_decides_nothing_is_changed(monkeypatch):
    assert not keep_freed_memory(torch.device("meta"))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    assert not keep_freed_memory(torch.device("cpu"))
