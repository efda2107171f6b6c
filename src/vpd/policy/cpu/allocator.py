"""How a process that trains on the CPU keeps its memory."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from vpd.device import is_cpu

# These numbers are from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory(device: torch.device) -> bool:
    """From now on, let the C library keep the memory that the main thread's tensors free, for later tensors.

    glibc gives a block above 32 MB back as soon as it is freed, and the system makes each page of the next block when
    it is first touched, which may take longer than computing what it holds: a chunk's logits are such blocks. The peak
    of memory stays about the same, but the process no longer holds less after it.

    Nothing changes on other devices than the CPU, with other libraries than glibc, and where the environment already
    says how glibc keeps memory (``MALLOC_...``, ``GLIBC_TUNABLES``).

    Args:
        device: The device that the process trains on.

    Returns:
        Whether the library will keep it.
    """
    is_told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if not is_cpu(device) or not sys.platform.startswith("linux") or is_told:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Without blocks of their own all tensors come from the heap, and with -1 the heap never shrinks.
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
