"""How a process on processors keeps its memory."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory(device: torch.device) -> bool:
    """Have the C library keep the memory that the main thread's tensors free, for those that come after them; from now
    on. Elsewhere than on a processor, with other libraries than glibc, and where the environment says how glibc is to
    keep memory (``MALLOC_...``, ``GLIBC_TUNABLES``), nothing changes.

    glibc gives a block above 32 MB back as soon as it is freed, and the system makes each page of the next one anew
    when it is first touched, which may take longer than to compute it: a chunk's logits are such blocks. The peak of
    memory stays about the same, but what the process holds no longer sinks after it.

    Returns:
        Whether it will.
    """
    is_told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if device.type != "cpu" or not sys.platform.startswith("linux") or is_told:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # With no block of its own every tensor comes from the heap, which -1 lets grow for good.
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
